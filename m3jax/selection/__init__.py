"""Selection of the references and of the attention heads that deserve a memory."""
