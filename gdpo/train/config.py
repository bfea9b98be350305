"""The options of training: dataclasses, read from YAML and overridden on the command line.

Leaf names follow diffusers' training scripts, the RL names follow TRL.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from gdpo.degradation import DegradationConfig
from gdpo.scores.group import GroupReward, Normalization, check_options
from gdpo.scores.remote import Patience
from gdpo.train.options import (
    DataConfig,
    ModelConfig,
    above_0,
    at_least,
    expand_paths,
    future,
    require,
    require_values,
    resumable,
    several,
)
from gdpo.train.start import FRESH
from gdpo.train.teacher import TeacherConfig


@dataclass
class TrainConfig:
    """What both methods share.

    Args:
        output_dir: the run's folder: config, metrics.jsonl, checkpoints, pictures, and the trained model at the end.
        seed: random seed of the whole run.
        train_batch_size: images per process and micro-batch.
        gradient_accumulation_steps: micro-batches per optimiser step.
        global_batch_size: images per optimiser step over all processes; sets gradient_accumulation_steps, so that the
            number of processes may change between starts. 0: gradient_accumulation_steps is used as given.
        max_train_steps: optimiser steps of the whole run.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler: learning rate schedule after the warm-up.
        lr_warmup_steps: steps of linear warm-up.
        adam_beta1: beta1 of AdamW.
        adam_beta2: beta2 of AdamW.
        adam_weight_decay: weight decay of AdamW.
        adam_epsilon: epsilon of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 switches clipping off.
        ema_decay: decay of a moving average of the trained weights; above 0, the average is the model that is saved.
        mixed_precision: autocast precision of the forward passes; "auto" is bf16 where the hardware has it, else no.
        checkpointing_steps: steps between checkpoints.
        checkpoints_total_limit: number of checkpoints to keep (at least 2).
        resume_from_checkpoint: "latest", "auto" (latest if there is one), or a checkpoint folder.
        allow_data_change: resume although the pictures of data.folder have changed; sample numbers continue.
        validation_steps: steps between before/after sheets; 0: only one, at the end.
        validation_images: pictures on a sheet.
        logging_steps: steps between rows of metrics.
        guard: scores of held-out pictures to watch, each with the largest change for the worse, or "log":
            {psnr_y: -0.3, brisque: +10%}. The change is from the start in gdpo, from the best value so far in naosd.
            The best checkpoint is kept in best/.
        guard_steps: steps between these evaluations; 0: validation_steps.
        guard_images: number of held-out pictures to evaluate.
        guard_action: beyond a limit, "stop" the run or go on ("keep_best"); both save the best checkpoint's model.
        guard_best: best checkpoint within all limits: the "last", or the one with the best value of a named score.
        report_to: tracker in addition to metrics.jsonl.
        backend: implementation of gdpo.kernels.
    """

    output_dir: str = resumable("runs/train", path=True)
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    degradation: DegradationConfig = field(default_factory=DegradationConfig)
    train_batch_size: int = resumable(1)
    gradient_accumulation_steps: int = resumable(1)
    global_batch_size: int = resumable(0)
    max_train_steps: int = resumable(1000)
    learning_rate: float = future(5e-5)
    lr_scheduler: Literal["constant", "cosine", "linear"] = future("constant")
    lr_warmup_steps: int = future(0)
    adam_beta1: float = future(0.9)
    adam_beta2: float = future(0.999)
    adam_weight_decay: float = future(1e-2)
    adam_epsilon: float = future(1e-8)
    max_grad_norm: float = future(1.0)
    ema_decay: float = 0.0
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    checkpointing_steps: int = resumable(500)
    checkpoints_total_limit: int = resumable(3)
    resume_from_checkpoint: str | None = resumable(None, path=True)
    allow_data_change: bool = resumable(False)
    validation_steps: int = resumable(500)
    validation_images: int = resumable(4)
    logging_steps: int = resumable(1)
    guard: dict[str, float | str] = field(default_factory=dict, metadata={"resumable": True})
    guard_steps: int = resumable(0)
    guard_images: int = resumable(16)
    guard_action: Literal["stop", "keep_best"] = resumable("stop")
    guard_best: str = resumable("last")
    report_to: Literal["none", "tensorboard", "wandb"] = resumable("none")
    backend: Literal["auto", "torch", "triton"] = resumable("auto")

    def __post_init__(self) -> None:
        expand_paths(self)

    def validate(self) -> None:
        """Raise ValueError naming the option, what it must be, and what it is."""
        require_values(self)
        require(abs(self.seed) < 1 << 63, "seed", "a number of 64 bits", self.seed)
        at_least(1, self, "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps")
        at_least(1, self, "logging_steps", "data.crop_size", "model.lora_rank", "model.layers_per_block")
        at_least(2, self, "checkpoints_total_limit")
        at_least(0, self, "lr_warmup_steps", "adam_weight_decay", "max_grad_norm", "validation_steps")
        at_least(0, self, "validation_images", "data.num_workers", "guard_steps", "global_batch_size")
        at_least(1, self, "guard_images")
        every = self.guard_steps or self.validation_steps
        require(not self.guard or every > 0, "guard_steps", "at least 1 with a guard", self.guard_steps)
        require(
            self.guard_best in ("last", *self.guard), "guard_best", "last or a score of guard", repr(self.guard_best)
        )
        above_0(self, "learning_rate", "adam_epsilon")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, name, "in [0,1)", getattr(self, name))
        if self.model.lora_alpha is not None:
            at_least(1, self, "model.lora_alpha")
        targets = self.model.lora_target_modules
        require(targets is None or all(targets or [""]), "model.lora_target_modules", "one or more names", targets)
        self.data.validate()
        widths = self.model.block_out_channels
        require(min(widths, default=0) >= 1, "model.block_out_channels", "one or more widths of at least 1", widths)

    def accumulate(self, processes: int) -> None:
        """Set gradient_accumulation_steps from global_batch_size, where that is given.

        Raises:
            ValueError: it is no multiple of batch x processes.
        """
        if self.global_batch_size:
            at_once = self.train_batch_size * processes
            self.gradient_accumulation_steps, rest = divmod(self.global_batch_size, at_once)
            require(
                rest == 0,
                "global_batch_size",
                f"a multiple of {at_once} (train_batch_size {self.train_batch_size} x {processes} processes)",
                self.global_batch_size,
            )

    def changeable(self) -> set[str]:
        """Of `identity`, the options that a resumed run may set anew all the same: see `future`."""
        return {f.name for f in fields(self) if f.metadata.get("future")} | {"max_train_steps"}

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it continues: all that the weights depend on."""
        own = _not_resumable(self)
        if self.lr_scheduler != "constant":  # the schedule ends with the run
            own["max_train_steps"] = self.max_train_steps
        return own


def _not_resumable(options: Any) -> dict[str, Any]:
    """The options without those marked `resumable`, nested as they are."""
    values = ((f.name, getattr(options, f.name)) for f in fields(options) if not f.metadata.get("resumable"))
    return {name: _not_resumable(value) if is_dataclass(value) else value for name, value in values}


@dataclass
class NAOSDConfig(TrainConfig):
    """Noise-aware one-step diffusion: supervised training of the generator (paper: L2 + 2 LPIPS + VSD).

    Args:
        pixel: pixel loss (the released code uses l2, the paper says l1).
        pixel_weight: weight of the pixel loss; 0 is off.
        perceptual_weight: weight of the perceptual loss; 0 is off.
        vsd_weight: weight of variational score distillation; 0 is off.
        pixel_relative: above 0, the pixel loss of a sample without a teacher is divided by its input's own error and
            multiplied by this typical error, so that clean pictures count as much as hard ones (not in the paper).
        perceptual: "lpips" (package lpips), "vgg" (see python -m gdpo.assets vgg16) or "auto": LPIPS when installed.
        perceptual_size: side of the random crop for the perceptual distance; 0 is the whole picture.
        perceptual_share: share of the samples with a perceptual distance (it costs more than a small generator's step).
        perceptual_on: samples with a perceptual distance; "degraded" leaves out those of the preset bicubic, which lost
            so little that the pixel loss suffices.
        perceptual_blocks: number of VGG blocks to compare, 1 to 5; fewer are cheaper.
        num_noises: number of noises per picture in a step.
        diversity: above 0, the perceptual distance is the energy score on VGG features (gdpo.train.losses.energy), and
            this is the weight of its spread term; needs num_noises of 2 or more. 1 is the proper score, 0 is off.
        grid_weight: weight of a penalty on errors with a period of 8 pixels (gdpo.train.losses.grid; not in the paper).
        lattice_weight: weight of a penalty on spectral peaks at periods of 2 and 4 pixels (the same file).
        spectrum_weight: weight of a penalty on a mean spectrum unlike the target's (the same file); if there is a
            teacher, of its samples.
        chroma_weight: weight of a penalty on colour errors (gdpo.train.losses.chroma; not in the paper).
        adversarial_weight: weight of a discriminator's loss (gdpo.train.losses.adversarial; not in the paper); if there
            is a teacher, it knows only its pictures. 0 is off.
        adversarial_learning_rate: learning rate of the discriminator.
        teacher: network whose pictures are targets beside the HR (gdpo.train.teacher; not in the paper).
        vsd_cfg: guidance scale of the VSD teacher.
        vsd_t: range of VSD timesteps as fractions of T.
        vsd_lora_rank: rank of the LoRA of VSD's "fake" model.
        vsd_learning_rate: learning rate of that LoRA.
        negative_prompt: negative prompt of the VSD teacher's guidance; None is the paper's.
    """

    pixel: Literal["l2", "l1"] = "l2"
    pixel_weight: float = 1.0
    pixel_relative: float = 0.0
    perceptual: Literal["auto", "lpips", "vgg"] = "auto"
    perceptual_weight: float = 2.0
    perceptual_size: int = 0
    perceptual_share: float = 1.0
    perceptual_on: Literal["all", "degraded"] = "all"
    perceptual_blocks: int = 5
    num_noises: int = 1
    diversity: float = 0.0
    grid_weight: float = 0.0
    lattice_weight: float = 0.0
    spectrum_weight: float = 0.0
    chroma_weight: float = 0.0
    adversarial_weight: float = 0.0
    adversarial_learning_rate: float = future(1e-4)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    vsd_weight: float = 1.0
    vsd_cfg: float = 7.5
    vsd_t: tuple[float, float] = (0.02, 0.5)
    vsd_lora_rank: int = 4
    vsd_learning_rate: float = future(5e-5)
    negative_prompt: str | None = None

    def validate(self) -> None:
        super().validate()
        at_least(0, self, "pixel_weight", "perceptual_weight", "vsd_weight", "diversity", "perceptual_size")
        at_least(0, self, "grid_weight", "lattice_weight", "spectrum_weight", "pixel_relative", "chroma_weight")
        at_least(0, self, "adversarial_weight")
        require(0 < self.perceptual_share <= 1, "perceptual_share", "above 0, at most 1", self.perceptual_share)
        at_least(1, self, "num_noises", "vsd_lora_rank")
        above_0(self, "vsd_learning_rate", "adversarial_learning_rate")
        require(1 <= self.perceptual_blocks <= 5, "perceptual_blocks", "1 to 5", self.perceptual_blocks)
        if self.grid_weight or self.lattice_weight or self.spectrum_weight:
            side = self.data.crop_size
            require(side >= 32, "data.crop_size", "at least 32 with a grid, lattice or spectrum weight", side)
        require(
            not (self.diversity and self.num_noises < 2),
            "diversity",
            "0 unless num_noises is 2 or more",
            self.diversity,
        )
        require(0 <= self.vsd_t[0] < self.vsd_t[1] <= 1, "vsd_t", "an increasing pair in [0,1]", self.vsd_t)
        if self.teacher.name:
            self.teacher.validate(self.data.crop_size, several(self.data.folder))
            require(self.num_noises == 1, "num_noises", "1 with a teacher", self.num_noises)
        if self.vsd_weight and self.model.full:
            raise ValueError("vsd_weight must be 0 with model.full: VSD needs the pretrained UNet as its teacher")


@dataclass
class GDPOConfig(TrainConfig):
    """Group direct preference optimisation of a trained generator.

    Args:
        algorithm: "gdpo" (the whole group, weighted by advantage), or on the same groups, for comparison: "grpo" (with
            the one-step likelihood), "nft" (DiffusionNFT), "diffusion_dpo" (best against worst), "dp2o" (DP2O-SR: pairs
            of best and worst); formulas in gdpo.train.losses.preference.
        num_generations: number of samples per picture (G).
        beta: scale of the log-likelihood, which is -beta/2 times the mean squared error of the prediction.
        epsilon: grpo: likelihood ratios are clipped to 1 - epsilon and 1 + epsilon.
        kl: grpo: weight of the divergence from the reference.
        nft_strength: nft: distance of the positive and the negative policy from the reference (the paper's beta).
        num_pairs: dp2o: number of best samples, each compared with as many of the worst.
        mean_reward_std: dp2o: the usual `reward_std`; groups with more spread count for more.
        reward_funcs: names from gdpo.scores.registry, your own module:function, or http://HOST:PORT/score/NAME of
            `python -m gdpo.rewards serve NAME`. "region_fidelity" measures fidelity where the picture is smooth,
            "region_detail" detail where it is textured.
        reward_weights: one number per reward function, relative to each other; None: all alike.
        reward_timeout: seconds to wait for one answer of a reward over HTTP.
        reward_patience: seconds to wait for a reward server that is gone before the run is saved and ends.
        reward_normalization: how rewards are combined. "group" (the paper): each reward is stretched to [0,1] in its
            group, and the weights apply among rewards of the same kind, fidelity or perceptual. "weighted": they also
            apply between the two kinds. "none": raw scores are weighted and added, so a reward with large differences
            counts for more.
        rho: "auto" weighs fidelity by the smooth and perception by the textured share of the picture (the paper);
            a number in [0,1] fixes the smooth share.
        texture_threshold: complexity above which a patch counts as texture.
        texture_weighted_loss: weight the log-ratio of each latent pixel by the texture mask (not in the paper).
        shared_noise: use one fresh noise for the whole group in the loss, not one per sample (not in the paper): terms
            that depend on the noise alone then cancel, because advantages sum to zero.
        reuse_latents: use the sampled latents as they are instead of decoding and encoding them (not in the paper).
        sample_batch_size: pictures to generate or encode at once; 0 is all B*G, halved with a notice if they do not fit
            the GPU's memory.
        compile_frozen: compile the sampler and the autoencoder with torch.compile.
    """

    algorithm: Literal["gdpo", "grpo", "nft", "diffusion_dpo", "dp2o"] = "gdpo"
    num_generations: int = 6
    beta: float = 5000.0
    epsilon: float = 0.2
    kl: float = 0.04
    nft_strength: float = 1.0
    num_pairs: int = 2
    mean_reward_std: float = 0.3
    reward_funcs: list[str] = field(default_factory=lambda: ["psnr_y", "maniqa", "musiq"])
    reward_weights: list[float] | None = None
    reward_timeout: float = resumable(Patience.timeout)
    reward_patience: float = resumable(Patience.wait)
    reward_normalization: Normalization = GroupReward.normalization
    rho: float | Literal["auto"] = GroupReward.rho
    texture_threshold: float = GroupReward.threshold
    texture_weighted_loss: bool = False
    shared_noise: bool = False
    reuse_latents: bool = False
    sample_batch_size: int = resumable(0)
    compile_frozen: bool = False

    def validate(self) -> None:
        super().validate()
        require(self.num_generations >= 2, "num_generations", "at least 2 (a group is compared)", self.num_generations)
        at_least(0, self, "sample_batch_size", "kl")
        above_0(self, "beta", "epsilon", "nft_strength")
        pairs, half = self.num_pairs, self.num_generations // 2
        require(self.algorithm != "dp2o" or 1 <= pairs <= half, "num_pairs", f"1 to {half} (half a group)", pairs)
        require(0 <= self.mean_reward_std <= 1, "mean_reward_std", "in [0,1]", self.mean_reward_std)
        above_0(self, "reward_timeout")
        at_least(0, self, "reward_patience")
        require(bool(self.reward_funcs), "reward_funcs", "at least one name", self.reward_funcs)
        check_options(len(self.reward_funcs), self.reward_weights, self.rho)
        require(not self.model.full, "model.full", "false for gdpo (the reference is the UNet with its LoRA off)", True)
        expected = "the folder of a trained generator (gdpo.train naosd, or: python -m gdpo.convert tiny --out FOLDER)"
        require(self.model.pretrained not in FRESH, "model.pretrained", expected, self.model.pretrained)

    def identity(self) -> dict[str, Any]:
        """A reward over HTTP may move to another host and port."""
        own = super().identity()
        own["reward_funcs"] = [urlsplit(name).path if "://" in name else name for name in self.reward_funcs]
        return own
