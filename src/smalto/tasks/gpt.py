"""Training of the autoregressive model: next-code prediction under a condition (LlamaGen section 2.2)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from smalto.analysis.scaling import GPTShape
from smalto.data.transforms import to_pixels
from smalto.errors import InputError
from smalto.losses.cross_entropy import linear_cross_entropy
from smalto.nn.layout import lay_out
from smalto.nn.whole import whole
from smalto.sampling.autoregressive import generate, uniforms_from_seeds
from smalto.sampling.compiled import CompiledEngine
from smalto.sampling.engine import DecodeEngine, EngineConfig
from smalto.sampling.memory import check_batch
from smalto.tasks.checkpoint import load_tokenizer, start_from
from smalto.tasks.optim import Schedule, build_optimizer, clip_gradients
from smalto.tasks.parallel import ShardingPlan, build_sharded
from smalto.tasks.step_log import LoggedModule
from smalto.tokenizers.precision import decode
from smalto.types import CodeBatch, SamplingConfig

log = logging.getLogger(__name__)


class GPTTask(LoggedModule):
    """Cross-entropy over codes; a frozen tokenizer rides along to turn samples into pictures.

    Args:
        net: makes the model.
        optimizer: makes an optimizer from parameter groups.
        schedule: of the learning rate.
        tokenizer_ckpt: checkpoint of the tokenizer that wrote the codes; its weights become part of this task's
            checkpoints, so sampling later needs one file. None trains without pictures.
        decode_batch_size: images per tokenizer pass when samples are decoded.
        loss_rows: codes whose logits exist at a time in training; 0: all of them, the logits of the whole batch.
        recompute_every: every n-th block recomputes its activations in the backward pass instead of keeping them;
            0: none, 1: all. Trades a third more arithmetic for the memory of the blocks.
        compile: compile the blocks in training (a minute or more, once). Compiled dropout draws other numbers from the
            same seeds. Validation and sampling stay eager.
    """

    def __init__(
        self,
        *,
        net: Callable[[], nn.Module],
        optimizer: Callable[..., Optimizer],
        schedule: Schedule | None = None,
        tokenizer_ckpt: str | Path | None = None,
        decode_batch_size: int = 64,
        loss_rows: int = 0,
        recompute_every: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if min(loss_rows, recompute_every) < 0:
            raise InputError(
                f"task.loss_rows is {loss_rows} and task.recompute_every is {recompute_every}; both must be at least 0 "
                "(0 switches off)"
            )
        self.net_factory = net
        self.optimizer_factory = optimizer
        self.schedule = schedule or Schedule()
        self.tokenizer_ckpt = tokenizer_ckpt
        self.decode_batch_size = decode_batch_size
        self.loss_rows = loss_rows
        self.recompute_every = recompute_every
        self.compile_net = compile
        self.verify = True  # compare checkpoints that are read with their checksums
        self.init_from: str | Path | None = None
        """Checkpoint whose weights the model starts with; set before :meth:`configure_model`."""
        self.gradient_watch: Callable[[Optimizer], Tensor | None] | None = None
        """Sees an optimizer's gradients before they are clipped, and tells their norm."""
        self.net: Any = None
        self.tokenizer: Any = None
        self.tokenizer_config: dict[str, Any] | None = None
        self.to_pixels: Callable[[Tensor], Tensor] = to_pixels
        """Float pictures to uint8; evaluation may resize here, before anything is rounded."""
        self.engine = EngineConfig()
        """How sampling and decoding to pictures compute; may be replaced at any time."""
        self._tokenizer_fingerprint: str | None = None
        self._weights_are_fixed = False
        self._packed: DecodeEngine | None = None

    @property
    def _gathers_half(self) -> bool:
        return self.device_mesh is not None and self.trainer.precision == "bf16-mixed"

    def configure_model(self) -> None:
        """Build the model and load the tokenizer once; Lightning may call this again."""
        if self.net is not None:
            return
        mesh = self.device_mesh  # under strategy=fsdp only
        self.net = build_sharded(
            self.net_factory,
            None if mesh is None else mesh["data_parallel"],
            device=torch.device("cpu") if mesh is None else self.trainer.strategy.root_device,
            half=self._gathers_half,
        )
        if mesh is not None and self.trainer.is_global_zero:
            log.info("sharded: %s", ShardingPlan.of(self.net, mesh.size()))
        if self.init_from is not None:
            start_from(self, self.init_from, kind="gpt")
        self.net.recompute_every = self.recompute_every
        if self.compile_net:
            self.net.compile_blocks()
        # DDP waits for the gradient of every parameter, whichever of the two it wraps, unless told otherwise.
        for module, prefix in ((self, "net."), (self.net, "")):
            names = [f"{prefix}conditioner.{name}" for name in self.net.conditioner.unused]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
        if self.tokenizer_ckpt is not None:
            loaded = load_tokenizer(self.tokenizer_ckpt, verify=self.verify)
            self.attach_tokenizer(loaded.tokenizer, loaded.config)
            self._tokenizer_fingerprint = loaded.fingerprint

    def on_fit_start(self) -> None:
        """Refuse codes that another tokenizer wrote: the loss would fall, the pictures would be noise."""
        meta = getattr(getattr(self.trainer, "datamodule", None), "meta", None)
        if meta is not None and self._tokenizer_fingerprint not in (None, meta["tokenizer"]["fingerprint"]):
            raise InputError(
                f"the codes were written by {meta['tokenizer']['path']} (weights {meta['tokenizer']['fingerprint']}), "
                f"task.tokenizer_ckpt={self.tokenizer_ckpt} has weights {self._tokenizer_fingerprint}; give the "
                "checkpoint that wrote the codes, or run smalto extract with this one"
            )

    def attach_tokenizer(self, tokenizer: Any, config: dict[str, Any]) -> None:
        """Take a tokenizer along, frozen, after checking that it speaks the model's codes."""
        given = (tokenizer.codebook_size, tokenizer.code_shape)
        wanted = (self.net.vocab_size, self.net.code_shape)
        if given != wanted:
            raise InputError(
                f"the tokenizer has {given[0]} codes on the grid {given[1]}, the model expects {wanted[0]} on "
                f"{wanted[1]}; choose tokenizer= and image_size= as the tokenizer was trained, or another one"
            )
        self.tokenizer = lay_out(tokenizer.eval().requires_grad_(False))
        self.tokenizer_config = config

    def train(self, mode: bool = True) -> "GPTTask":
        """Train or evaluate the model; the tokenizer always evaluates."""
        super().train(mode)
        if self.tokenizer is not None:
            self.tokenizer.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write down how to build the tokenizer whose weights are inside."""
        checkpoint["tokenizer_config"] = self.tokenizer_config

    def configure_optimizers(self) -> Any:
        """One optimizer, its schedule per step."""
        optimizer = build_optimizer(self.optimizer_factory, self.net)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule.scheduler(optimizer), "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning asks here; what it would do itself fails with fused optimizers in bf16-mixed."""
        norm = None if self.gradient_watch is None else self.gradient_watch(optimizer)
        by_norm = gradient_clip_algorithm in (None, "norm")
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        if gradient_clip_val and by_norm and scaler is None:
            clip_gradients(optimizer, gradient_clip_val, norm=norm)
        elif gradient_clip_val and by_norm and optimizer.defaults.get("fused"):
            # Asked so that nothing is fetched from the device.
            clip_gradients(optimizer, gradient_clip_val, loss_scale=scaler.scale(torch.ones((), device=self.device)))
        else:  # of others the loss scale is off already
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @property
    def tokens_per_image(self) -> int:
        """Codes of an image."""
        return self.net.num_codes

    @property
    def training_flops(self) -> float:
        """Of one image in a training step, recomputation not counted, as :class:`smalto.analysis.scaling.GPTShape`."""
        return GPTShape.of(self.net).training_flops

    @staticmethod
    def condition(batch: CodeBatch) -> tuple[Tensor, Tensor | None]:
        """What the batch is conditioned on, and the mask of its valid tokens."""
        if "text" in batch:
            return batch["text"], batch["text_mask"]
        return batch["label"], None

    def _loss(self, batch: CodeBatch) -> tuple[Tensor, Tensor]:
        logits = self.net(batch["codes"], *self.condition(batch)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["codes"].flatten())
        return loss, logits

    def training_loss(self, batch: CodeBatch) -> Tensor:
        """Mean cross-entropy per code, in nats, with as many logits at a time as ``loss_rows`` says."""
        if self.loss_rows:
            targets = batch["codes"].flatten()

            def loss_of_rows(hidden: Tensor, weight: Tensor) -> Tensor:
                return linear_cross_entropy(hidden.flatten(0, 1), weight, targets, rows=self.loss_rows)

            return self.net.apply_head(batch["codes"], *self.condition(batch), head=loss_of_rows)
        return self._loss(batch)[0]

    def training_step(self, batch: CodeBatch, batch_idx: int) -> Tensor:
        """Mean cross-entropy per code, in nats."""
        loss = self.training_loss(batch)
        self.step_log.note({"train/loss": loss, "train/lr": self.trainer.optimizers[0].param_groups[0]["lr"]})
        return loss

    def validation_step(self, batch: CodeBatch, batch_idx: int) -> None:
        """Cross-entropy per code in nats, accuracy of the most probable code; conditions are never dropped here.

        In float32 whatever training computes in, as ``smalto evaluate``; not where sharded weights are gathered in
        bfloat16: those values have names of their own.
        """
        suffix = "_bf16" if self._gathers_half else ""
        with nullcontext() if self._gathers_half else torch.autocast(self.device.type, enabled=False):
            loss, logits = self._loss(batch)
        accuracy = (logits.argmax(-1) == batch["codes"]).float().mean()
        metrics = {f"val/loss{suffix}": loss, f"val/accuracy{suffix}": accuracy}
        self.log_dict(metrics, sync_dist=True, batch_size=len(batch["codes"]))

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Within it the model's weights do not change, so that they are packed for decoding once, not per call.

        If they are sharded, all processes must enter it together: they are gathered and packed at the start, and within
        each process decodes by itself.
        """
        if self._weights_are_fixed:  # of another one already: the weights stay packed until that ends
            yield
            return
        self._weights_are_fixed = True
        try:
            with whole(self.net):
                if isinstance(self.net, FSDPModule):
                    self._packed = self._new_decoder(rows=2 * self.decode_batch_size)
                yield
        finally:
            self._weights_are_fixed, self._packed = False, None

    def check_memory(self, images: int, *, guided: bool) -> None:
        """Refuse to draw so many images at once where they would not fit, before anybody asks for them.

        Raises:
            ValueError: what fits.
        """
        check_batch(self.net, images, guided=guided, dtype=self._engine_dtype())

    def _decoder(self, images: int, *, guided: bool) -> DecodeEngine:
        if self._packed is not None:
            held = self._packed.held_bytes
            check_batch(self.net, images, guided=guided, dtype=self._packed.dtype, packed=True, held=held)
            return self._packed
        check_batch(self.net, images, guided=guided, dtype=self._engine_dtype())
        decoder = self._new_decoder(rows=images * (2 if guided else 1))
        self._packed = decoder if self._weights_are_fixed else None
        return decoder

    def _engine_dtype(self) -> str:
        return self.engine.computes_in(self.device)

    def _new_decoder(self, *, rows: int) -> DecodeEngine:
        net, dtype = self.net, self._engine_dtype()
        if self.engine.compiles(self.device):
            return CompiledEngine(net, dtype=dtype)
        return DecodeEngine(net, dtype=dtype, rows=rows)

    def sample_codes(
        self,
        condition: Tensor,
        *,
        sampling: SamplingConfig,
        seeds: Tensor,
        condition_mask: Tensor | None = None,
    ) -> Tensor:
        """Codes (B, L) for class labels (B,) or text features; row i depends on ``seeds[i]`` only.

        Raises:
            ValueError: conditions the model does not know, a batch that memory does not hold.
        """
        if isinstance(self.net, FSDPModule) and not self._weights_are_fixed:
            with self.fixed_weights():
                return self.sample_codes(condition, sampling=sampling, seeds=seeds, condition_mask=condition_mask)
        self.net.conditioner.check(condition)
        training = self.training
        self.eval()
        try:
            return generate(
                self._decoder(len(condition), guided=sampling.cfg_scale > 1),
                condition.to(self.device),
                sampling=sampling,
                uniforms=uniforms_from_seeds(seeds, self.net.num_codes),
                condition_mask=None if condition_mask is None else condition_mask.to(self.device),
            )
        finally:
            self.train(training)

    def sample_images(
        self,
        condition: Tensor,
        *,
        sampling: SamplingConfig,
        seeds: Tensor,
        condition_mask: Tensor | None = None,
    ) -> Tensor:
        """Images, uint8 (B, 3, H, W), for class labels (B,) or text features (B, T, C)."""
        codes = self.sample_codes(condition, sampling=sampling, seeds=seeds, condition_mask=condition_mask)
        return self.decode_codes(codes)

    @torch.inference_mode()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pictures of int64 codes (B, L) as uint8 (B, 3, H, W)."""
        if self.tokenizer is None:
            raise InputError("this model was trained without a tokenizer; give tokenizer_ckpt=PATH to see pictures")
        chunks = codes.split(self.decode_batch_size)
        pictures = (decode(self.tokenizer, chunk, precision=self.engine.decode) for chunk in chunks)
        return torch.cat([self.to_pixels(picture) for picture in pictures])
