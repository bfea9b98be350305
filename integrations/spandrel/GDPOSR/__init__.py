"""The descriptor that spandrel's contribution guide asks for: how to tell the files, and the shape read off them.

from spandrel import MAIN_REGISTRY, ArchSupport
MAIN_REGISTRY.add(ArchSupport.from_architecture(GDPOSRArch()))
"""

from __future__ import annotations

from spandrel import Architecture, ImageModelDescriptor, SizeRequirements, StateDict
from spandrel.util import KeyCondition, get_seq_len

from .__arch.gdposr import GDPOSR, CompactUNet, TinyUNet


class GDPOSRArch(Architecture[GDPOSR]):
    def __init__(self) -> None:
        super().__init__(
            id="GDPO-SR",
            detect=KeyCondition.has_all(
                "noise",
                "amounts",
                "unet.conv_in.weight",
                KeyCondition.has_any(
                    KeyCondition.has_all("unet.head.up1.weight", "unet.encoder.0.0.conv1.weight"),
                    KeyCondition.has_all("unet.recover.weight", "unet.beyond", "unet.base.weight"),
                ),
            ),
        )

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[GDPOSR]:
        multiple = 1
        if "unet.recover.weight" in state_dict:
            layers = get_seq_len(state_dict, "unet.convs")
            widths = [len(state_dict[f"unet.acts.{i}.weight"]) for i in range(layers + 1)]
            unet, tag = CompactUNet(widths, state_dict["unet.base.weight"].shape[-1]), "compact"
        else:
            levels = get_seq_len(state_dict, "unet.encoder")
            widths = [len(state_dict[f"unet.encoder.{i}.0.conv1.bias"]) for i in range(levels)]
            head = tuple(len(state_dict[f"unet.head.conv{i}.bias"]) for i in (1, 2))
            unet, tag = TinyUNet(tuple(widths), get_seq_len(state_dict, "unet.encoder.0"), head), "tiny"
            multiple = 2 ** (levels - 1)
        return ImageModelDescriptor(
            GDPOSR(unet, state_dict["noise"].shape[-1]),
            state_dict,
            architecture=self,
            purpose="SR",
            tags=[tag],
            supports_half=True,
            supports_bfloat16=True,
            scale=4,
            input_channels=3,
            output_channels=3,
            size_requirements=SizeRequirements(multiple_of=multiple),
        )


__all__ = ["GDPOSR", "GDPOSRArch"]
