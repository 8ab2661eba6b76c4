"""Training of routers and LoRA on the Hugging Face side; needs the [train] extra."""
