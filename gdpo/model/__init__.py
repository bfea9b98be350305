"""The generator's parts. To add an architecture: architectures.py.

architectures.py     the UNets by class name: tiny.py, compact.py, network_unet.py (a published network)
codecs.py            pictures <-> latents: a VAE, or a pixel-unshuffle
prompts.py           text -> embeddings
lora*.py             LoRA: add, switch, merge; its files; its layers as fused kernels
folders.py, parts.py a model folder and what is in it; hub.py fetches and pushes one
spandrel_networks.py, ncnn.py, released.py, exported.py
                     what others wrote, read: published networks, the authors' LoRA files, an ONNX export
single_file.py       a generator written as one file for other programs
diffusers_patches.py, training_patches.py, layers.py
                     diffusers' networks, made cheaper
random_folder.py     model folders with random weights
"""
