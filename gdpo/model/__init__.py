"""The generator's parts: UNets, codecs, LoRA, prompts, and the folders that hold them."""
