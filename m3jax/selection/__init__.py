"""Selection of the references and of the heads that deserve a memory."""
