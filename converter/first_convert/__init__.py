"""first-convert: Hugging Face checkpoints, LoRA and FiRST routers into one GGUF file."""
