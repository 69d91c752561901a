"""Training of an image tokenizer: reconstruction, perceptual and, later, adversarial loss (LlamaGen section 2.1)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from smalto.data.transforms import to_float, to_pixels
from smalto.errors import InputError
from smalto.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, adaptive_weight, mean_logit
from smalto.nn.flops import forward_flops
from smalto.nn.layout import image_layout, lay_out
from smalto.sampling.engine import EngineConfig
from smalto.tasks.checkpoint import start_from
from smalto.tasks.ddp import NetworkDDPStrategy
from smalto.tasks.optim import Schedule, build_optimizer, clip_gradients
from smalto.tasks.parallel import from_the_seed
from smalto.tasks.step_log import LoggedModule
from smalto.tokenizers.precision import in_precision
from smalto.types import CodeShape, ImageBatch

RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss}


class TokenizerTask(LoggedModule):
    """VQGAN training with a discriminator that does not exist for the model before ``disc_start``.

    Optimization is manual. ``global_step`` counts generator steps only: the discriminator's optimizer is stepped
    outside Lightning's counter, or ``max_steps``, checkpoints and ``disc_start`` would all shift when it starts.

    Args:
        net: makes the tokenizer.
        optimizer: makes an optimizer from parameter groups; used for both networks.
        discriminator: makes the discriminator; None (or an empty node) trains without one.
        perceptual: makes the perceptual loss; None (or an empty node) trains without one.
        schedule: learning rate of both networks.
        reconstruction_loss: ``l2`` or ``l1``, on [-1, 1] images.
        reconstruction_weight: factor of it.
        perceptual_weight: factor of LPIPS.
        disc_weight: factor of the adversarial term.
        disc_start: generator step at which the discriminator comes into being.
        disc_loss: ``hinge``, ``vanilla`` or ``non_saturating``.
        gen_loss: ``hinge`` or ``non_saturating``.
        adaptive_disc_weight: scale the adversarial term by the ratio of gradient norms at the last layer (VQGAN);
            off in the paper's runs.
        gradient_clip: maximal global norm, for each network; 0 does not clip.
        compile: compile encoder, decoder and perceptual loss for training (minutes, once). Validation and
            :meth:`reconstruct` stay eager, so that other sizes compile nothing; the discriminator too, whose
            normalisation talks to other processes.
        init_discriminator: with ``init_from``, the discriminator starts with the weights of that checkpoint, too.
    """

    def __init__(
        self,
        *,
        net: Callable[[], nn.Module],
        optimizer: Callable[..., Optimizer],
        discriminator: Callable[[], nn.Module] | None = None,
        perceptual: Callable[[], nn.Module] | None = None,
        schedule: Schedule | None = None,
        reconstruction_loss: str = "l2",
        reconstruction_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        disc_weight: float = 0.5,
        disc_start: int = 20_000,
        disc_loss: str = "hinge",
        gen_loss: str = "hinge",
        adaptive_disc_weight: bool = False,
        gradient_clip: float = 1.0,
        compile: bool = False,
        init_discriminator: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        for key, value, known in (
            ("reconstruction_loss", reconstruction_loss, RECONSTRUCTION_LOSSES),
            ("disc_loss", disc_loss, DISCRIMINATOR_LOSSES),
            ("gen_loss", gen_loss, GENERATOR_LOSSES),
        ):
            if value not in known:
                raise InputError(f"task.{key} is {value!r}, must be one of {', '.join(known)}")
        self.net_factory = net
        self.optimizer_factory = optimizer
        self.discriminator_factory = discriminator or None
        self.perceptual_factory = perceptual if perceptual and perceptual_weight > 0 else None
        self.schedule = schedule or Schedule()
        self.reconstruction_loss = RECONSTRUCTION_LOSSES[reconstruction_loss]
        self.reconstruction_weight = reconstruction_weight
        self.perceptual_weight = perceptual_weight
        self.disc_weight = disc_weight
        self.disc_start = disc_start
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.gen_loss = GENERATOR_LOSSES[gen_loss]
        self.adaptive_disc_weight = adaptive_disc_weight
        self.gradient_clip = gradient_clip
        self.compile_net = compile
        self.init_discriminator = init_discriminator
        self.to_pixels: Callable[[Tensor], Tensor] = to_pixels
        """Float pictures to uint8; evaluation may resize here, before anything is rounded."""
        self.engine = EngineConfig()
        """How :meth:`reconstruct` decodes; may be replaced at any time."""
        self.verify = True
        """Whether checkpoints that this task reads are compared with their checksums."""
        self.init_from: str | Path | None = None
        """Checkpoint whose weights the network starts with; set before :meth:`configure_model`."""
        self._flops: dict[bool, float] = {}
        self.gradient_watch: Callable[[Optimizer], Tensor | None] | None = None
        """Sees an optimizer's gradients before they are clipped, and tells their norm."""
        self._replicas: dict[str, Any] = {}
        self._distance: Callable[[nn.Module, Tensor, Tensor], Tensor] = _mean_distance
        self.net: Any = None
        self.discriminator: Any = None
        self.perceptual: Any = None

    def configure_model(self) -> None:
        """Build the networks once; Lightning may call this again."""
        if self.net is not None:
            return
        with from_the_seed():
            self.net = lay_out(self.net_factory())
            if self.discriminator_factory:
                # Without group normalisation channels last is right everywhere.
                self.discriminator = self.discriminator_factory().to(memory_format=torch.channels_last)
            self.perceptual = self.perceptual_factory() if self.perceptual_factory else None
        if self.init_from is not None:
            start_from(self, self.init_from, kind="tokenizer", discriminator=self.init_discriminator)
        if self.compile_net:
            self.net.compile_stacks()
            self._distance = torch.compile(_mean_distance, dynamic=False, fullgraph=True)

    def setup(self, stage: str) -> None:
        """Refuse what manual optimization cannot do, and options that would have no effect."""
        if self.trainer.precision == "16-mixed":
            raise InputError(
                "trainer.precision is 16-mixed; two optimizers share no loss scaler here, use bf16-mixed or 32"
            )
        strategy: Any = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            raise InputError(
                "strategy=fsdp shards transformers; a tokenizer fits on every device many times over, so train it with "
                "strategy=ddp"
            )
        if self.init_discriminator and self.discriminator_factory is None:
            raise InputError("task.init_discriminator=true, but this run has no discriminator (discriminator=none)")
        if torch.are_deterministic_algorithms_enabled():
            torch.backends.cudnn.benchmark = False  # it would choose by time, which is never twice the same
        plain_ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, NetworkDDPStrategy)
        if self.discriminator_factory is not None and plain_ddp:
            # Configs of older runs name Lightning's own strategy. It wraps both networks at once, each of which has no
            # gradient in the other's backward pass. Read when the module is wrapped, which comes after this.
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def wrap_networks(self, wrap: Callable[[nn.Module], Any]) -> None:
        """Replace calls of each network in training by those of its wrap; weights and their names stay as they are."""
        self._replicas = {name: wrap(net) for name, net in self._networks().items()}

    def teardown(self, stage: str) -> None:
        """Let go of the wraps, whose processes end."""
        self._replicas = {}

    def _networks(self) -> dict[str, nn.Module]:
        nets = {"net": self.net, "discriminator": self.discriminator}
        return {name: net for name, net in nets.items() if net is not None}

    def _in_training(self, name: str) -> Any:
        """A network as its own backward pass needs it: under ddp its wrap, which averages the gradients."""
        return self._replicas[name] if name in self._replicas else getattr(self, name)

    def configure_optimizers(self) -> Any:
        """One optimizer per network, generator first; the discriminator's rate follows the generator's."""
        optimizers = [build_optimizer(self.optimizer_factory, net) for net in self._networks().values()]
        return optimizers, [self.schedule.scheduler(optimizers[0])]

    @property
    def codebook_size(self) -> int:
        """Entries of the tokenizer's codebook."""
        return self.net.codebook_size

    @property
    def code_shape(self) -> CodeShape:
        """Grid of codes of an image."""
        return self.net.code_shape

    @property
    def tokens_per_image(self) -> int:
        """Codes of an image."""
        return sum(rows * columns for rows, columns in self.code_shape)

    @property
    def training_flops(self) -> float:
        """Of one image in the training step that comes next, see :meth:`flops`."""
        adversarial = self.global_step >= self.disc_start
        if adversarial not in self._flops:  # half a second of three networks
            self._flops[adversarial] = self.flops(adversarial=adversarial)
        return self._flops[adversarial]

    def flops(self, *, adversarial: bool) -> float:
        """Of one image in a training step before or after the discriminator's start, a multiply-add as two.

        A backward pass costs what the forward pass does for inputs, and as much again for weights. The perceptual
        network sees both images and gives gradients to one; the discriminator, once it is there, judges one for the
        generator and two for itself.
        """
        image = torch.empty(1, 3, self.net.image_size, self.net.image_size, device="meta")
        flops = 3.0 * forward_flops(self.net, image)
        if self.perceptual is not None:
            flops += 3 * forward_flops(self.perceptual, image, image) / 2
        if self.discriminator is not None and adversarial:
            flops += 8 * forward_flops(self.discriminator, image)
        return flops

    @staticmethod
    def _image(batch: ImageBatch) -> Tensor:
        image = to_float(batch["image"])
        return image.contiguous(memory_format=image_layout(image.device))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """One generator step, then, from ``disc_start`` on, one discriminator step on the same reconstructions."""
        image = self._image(batch)
        optimizers: Any = self.optimizers()
        generator = optimizers[0] if isinstance(optimizers, list) else optimizers
        # Read before the step: stepping raises global_step, and the discriminator would start one step early.
        adversarial = self.discriminator is not None and self.global_step >= self.disc_start
        reconstruction, losses = self.generator_losses(image, adversarial=adversarial)
        generator.zero_grad(set_to_none=True)
        self.manual_backward(losses["loss"])
        self._clip(generator)
        generator.step()
        rate = generator.param_groups[0]["lr"]
        if adversarial:
            losses |= self._discriminator_step(image, reconstruction.detach(), rate)
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.step_log.note({f"train/{key}": value for key, value in losses.items()} | {"train/lr": rate})

    def generator_losses(self, image: Tensor, *, adversarial: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction of float (B, 3, H, W) in [-1, 1], and every term of the loss; ``loss`` is to be minimised."""
        reconstruction, quantized = self._in_training("net")(image)
        rec = self.reconstruction_loss(reconstruction, image)
        losses = {
            "rec_loss": rec,
            "codebook_loss": quantized.codebook_loss,
            "commitment_loss": quantized.commitment_loss,
        }
        image_loss = self.reconstruction_weight * rec
        if self.perceptual is not None:
            losses["perceptual_loss"] = self._distance(self.perceptual, reconstruction, image)
            image_loss = image_loss + self.perceptual_weight * losses["perceptual_loss"]
        total = image_loss + quantized.loss
        if self.net.quantizer.entropy_weight > 0:
            losses["entropy_loss"] = quantized.entropy_loss
        if adversarial:
            # The generator's pass must not leave gradients there. Not the wrap: it would expect some.
            self.discriminator.requires_grad_(False)
            losses["gen_loss"] = self.gen_loss(self.discriminator(reconstruction))
            weight: Tensor | float = self.disc_weight
            if self.adaptive_disc_weight:
                weight = self.disc_weight * adaptive_weight(image_loss, losses["gen_loss"], self.net.last_layer)
                losses["adaptive_weight"] = weight
            total = total + weight * losses["gen_loss"]
            self.discriminator.requires_grad_(True)
        losses["loss"] = total
        return reconstruction, losses

    def _discriminator_step(self, image: Tensor, reconstruction: Tensor, rate: float) -> dict[str, Tensor]:
        optimizers: Any = self.optimizers(use_pl_optimizer=False)
        optimizer = optimizers[1]
        for group in optimizer.param_groups:
            group["lr"] = rate
        discriminator = self._in_training("discriminator")
        real, fake = discriminator(image), discriminator(reconstruction)
        loss = self.disc_loss(real, fake)
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(self.disc_weight * loss)
        self._clip(optimizer)
        optimizer.step()
        return {"disc_loss": loss, "disc_real": mean_logit(real), "disc_fake": mean_logit(fake)}

    def _clip(self, optimizer: Optimizer) -> None:
        norm = None if self.gradient_watch is None else self.gradient_watch(optimizer)
        if self.gradient_clip > 0:
            clip_gradients(optimizer, self.gradient_clip, norm=norm)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Losses of the batch; its reconstruction goes on to the callbacks. In float32, as ``smalto evaluate``."""
        image = self._image(batch)
        with torch.autocast(self.device.type, enabled=False):
            reconstruction, quantized = self.net(image)
            rec_loss = self.reconstruction_loss(reconstruction, image)
            distance = None if self.perceptual is None else self.perceptual(reconstruction, image).mean()
        self.log(
            "val/rec_loss",
            rec_loss,
            sync_dist=True,
            batch_size=len(image),
        )
        if distance is not None:
            self.log(f"val/{self.perceptual.name}", distance, sync_dist=True, batch_size=len(image))
        return {"reconstruction": self.to_pixels(reconstruction), "codes": quantized.codes}

    @torch.inference_mode()
    def reconstruct(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) to its reconstruction, uint8, and its codes (B, L), which are float32's always."""
        quantized = self.net.quantize(to_float(image))
        with in_precision(self.engine.decode, image.device):
            reconstruction = self.net.decode_latent(quantized.latent).float()
        return self.to_pixels(reconstruction), quantized.codes


def _mean_distance(perceptual: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A function, not a method: what is compiled is no module, so none changes its name."""
    return perceptual(x, y).mean()
