"""Evaluation of checkpoints and knowledge: losses, questions, tasks, reports and plots."""
