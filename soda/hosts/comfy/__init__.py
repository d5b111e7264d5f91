"""ComfyUI 0.30 or newer: adapters as ModelPatcher patches, training on its models, its folders and its messages."""
