"""The trainings that are rehearsed: together they use every option that changes a step (see test_coverage)."""

from gpu_rehearsal.runs import FEATURES, GENERATION, GPT, TEXT, TOKENIZER

_TEXT = [word for word in GPT if not word.startswith(("data", "model.conditioner"))] + TEXT
_TEXT += ["data.num_train=128", "data.num_val=8", "data.batch_size=4"]
_TOKENIZER = [*TOKENIZER, *FEATURES]
_OTHER_DISCRIMINATOR = [word for word in _TOKENIZER if not word.startswith("discriminator.")]

CASES: dict[str, list[str]] = {
    "gpt": [*GPT, "callbacks=_common"],
    "gpt_bf16": [*GPT, "callbacks=_common", "trainer.precision=bf16-mixed"],
    "gpt_fp16": [*GPT, "callbacks=_common", "trainer.precision=16-mixed"],
    "gpt_accumulated": [
        *(
            *GPT,
            "callbacks=_common",
            "trainer.accumulate_grad_batches=2",
            "task.loss_rows=16",
            "task.recompute_every=1",
        ),
        *("model.drop_path=0.1", "model.attn_dropout=0.1", "model.num_kv_heads=1", "trainer.precision=bf16-mixed"),
    ],
    "gpt_plain_optimizer": [*GPT, "callbacks=_common", "task.optimizer.fused=false", "~callbacks.gradient_guard"],
    "gpt_options": [
        *(*GPT, "callbacks=_common", "task.schedule.kind=cosine", "task.schedule.warmup_steps=2"),
        *("callbacks.ema.warmup=false", "callbacks.gradient_guard.spike_factor=null", "model.condition_rope=identity"),
    ],
    "gpt_generation": [*GPT, *GENERATION, "protocol.labels=random"],
    "gpt_generation_bf16": [
        *GPT,
        *GENERATION,
        "trainer.precision=bf16-mixed",
        "callbacks.generation.cfg_scales=[1.0,2.0]",
        "callbacks.generation.every_n_steps=0",
        "callbacks.generation.final_num_samples=4",
        "callbacks.generation.num_samples=0",
    ],
    "text": _TEXT,
    "text_bf16": [*_TEXT, "trainer.precision=bf16-mixed", "model.conditioner.train_null=false", "task.loss_rows=16"],
    "tokenizer": _TOKENIZER,
    "tokenizer_bf16": [*_TOKENIZER, "trainer.precision=bf16-mixed"],
    "tokenizer_adaptive": [
        *(
            *_TOKENIZER,
            "task.adaptive_disc_weight=true",
            "task.reconstruction_loss=l1",
        ),
        *("task.disc_loss=vanilla", "task.gen_loss=non_saturating", "tokenizer.quantizer.entropy_weight=0.1"),
        *("trainer.precision=bf16-mixed", "perceptual.dropout=0.5", "tokenizer.dropout=0.1"),
    ],
    "tokenizer_stylegan": [
        *(*_OTHER_DISCRIMINATOR, "discriminator=stylegan", "task.disc_start=1", "trainer.precision=bf16-mixed"),
        *("trainer.max_steps=4", "data.batch_size=1", "data.num_val=2"),  # 36 million parameters
    ],
    "tokenizer_bare": [
        *(*_OTHER_DISCRIMINATOR, "discriminator=none", "perceptual=none", "tokenizer.quantizer.l2_norm=false"),
        *("task.gradient_clip=0", "callbacks.reconstruction.ssim_data_range=2.0"),
    ],
}
NEEDS_TOKENIZER = {name for name in CASES if "generation" in name}
SLOW = {"tokenizer_stylegan"}
