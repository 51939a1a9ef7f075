"""The command `quietstar train`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import CONFIG_NAME

from quietstar.models import QuietStarConfig, QuietStarForCausalLM
from quietstar.models.adapters import is_adapter
from quietstar.models.checkpoint import check_tokenizer, contents
from quietstar.models.family_check import check_decoder
from quietstar.training.adapted_model import check_packages, with_adapters
from quietstar.training.arguments import DataArguments, ModelArguments, PaperTrainingArguments, TrainParser
from quietstar.training.checkpoints import check_output_dir, checkpoints, fault, remove_checkpoints, to_resume
from quietstar.training.checks import NonFiniteError
from quietstar.training.data import collate_windows
from quietstar.training.sources import DataError
from quietstar.training.stages import check_stages, parse_stages
from quietstar.training.trainer import QuietStarTrainer
from quietstar.training.windows import Corpus, EndlessWindows


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 2 for an invalid argument, 1 if training had to stop."""
    model_args, data_args, training_args = TrainParser().parse(argv)
    try:
        resume = _checkpoint_to_resume(training_args)
        trainer = make_trainer(model_args, data_args, training_args)
        trainer.data_source = data_args.data
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"quietstar train: {error}", file=sys.stderr)
        return 2
    if training_args.overwrite_output_dir:
        with training_args.main_process_first(local=False, desc="removing checkpoints"):
            if training_args.process_index == 0:
                remove_checkpoints(training_args.output_dir)
    try:
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    except NonFiniteError as error:
        print(f"quietstar train: training stopped: {error}", file=sys.stderr)
        return 1
    except DataError as error:  # later in a stream
        print(f"quietstar train: {error}", file=sys.stderr)
        return 2
    trainer.save_state()
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card()
    return 0


def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, training_args: PaperTrainingArguments
) -> QuietStarTrainer:
    """Create the trainer, with model, tokenizer and windows of text.

    Raises:
        ValueError, OSError: a model, a tokenizer or text is missing or cannot be used; the message names the argument.
        ImportError: a package for adapters is missing.
    """
    check_packages(model_args)
    _check_fields(model_args)
    set_seed(training_args.seed)
    if data_args.streaming and training_args.max_steps < 1:
        raise ValueError("max_steps must be given with streaming, where nobody knows how long the text is")
    with training_args.main_process_first(desc="reading the text"):
        corpus = Corpus(data_args, training_args.seed)
    model, tokenizer = load_model(model_args)
    stages = None if model_args.stages is None else parse_stages(model_args.stages)
    if stages is not None:
        check_stages(stages, model.config, data_args.block_size)
    least = max([model.config.lookahead, *(stage.lookahead for stage in stages or ())]) + 2
    if data_args.block_size < least:
        raise ValueError(f"block_size must be >= lookahead + 2 = {least}, got {data_args.block_size}")
    most = model.config.max_position_embeddings
    if data_args.block_size > most:
        raise ValueError(f"block_size must be <= max_position_embeddings = {most}, got {data_args.block_size}")

    with training_args.main_process_first(desc="packing the text"):
        train_windows, held_out = corpus.windows(tokenizer, model.get_input_embeddings().num_embeddings)
    if model_args.lora_r is not None:
        model = with_adapters(model, tokenizer, model_args, training_args)
    teacher = None if model_args.teacher is None else _load_teacher(model_args.teacher)
    if data_args.streaming:
        train_windows = EndlessWindows(train_windows)
    if held_out is None:
        training_args.eval_strategy = IntervalStrategy.NO
    return QuietStarTrainer(
        model,
        training_args,
        train_dataset=train_windows,
        eval_dataset=held_out,
        data_collator=collate_windows,
        processing_class=tokenizer,
        teacher=teacher,
        stages=stages,
        distil=model_args.distil,
    )


def _check_fields(model_args: ModelArguments) -> None:
    """Check the flags against a checkpoint's configuration before anything large is read.

    Raises:
        ValueError: they contradict each other, or a teacher is given that would not be used.
    """
    try:
        saved, _ = PreTrainedConfig.get_config_dict(model_args.model)
    except (OSError, ValueError):  # reported when it is loaded
        saved = {}
    saved = saved if saved.get("model_type") == QuietStarConfig.model_type else {}
    config = QuietStarConfig.from_dict(saved | model_args.config_fields())
    config.check()
    asked = config.baseline == "teacher" or config.kl_weight > 0 or model_args.distil is not None
    if model_args.teacher is not None and not asked:
        raise ValueError(
            f"teacher must be left out without baseline teacher, kl_weight or distil, got {model_args.teacher}"
        )
    if config.anchor_choice == "given":
        raise ValueError(
            "anchor_choice must be random or entropy, got 'given' in the checkpoint: windows of text have no anchors, "
            "which QuietStarTrainer takes from rows of its own"
        )


def _load_teacher(name: str) -> QuietStarForCausalLM:
    try:
        saved, _ = PreTrainedConfig.get_config_dict(name)
        if saved.get("model_type") != QuietStarConfig.model_type:
            raise ValueError("no Quiet-STaR checkpoint")
        return QuietStarForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        message = f"teacher must be the folder or hub name of a Quiet-STaR checkpoint, got {name!r}: {error}"
        raise ValueError(message) from error


def load_model(model_args: ModelArguments) -> tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]:
    """Load a Quiet-STaR checkpoint (ours or the authors') or create a model from an ordinary checkpoint.

    Raises:
        ValueError: the checkpoint is neither, there is no tokenizer, or flags initialise thought embeddings that the
            checkpoint already has.
    """
    name = model_args.model
    if is_adapter(name):
        raise ValueError(
            f"model must be a checkpoint, got an adapter in {name}: go on with its training by "
            "--resume_from_checkpoint, or merge it first (docs/peft.md)"
        )
    try:
        saved, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be the folder or hub name of a checkpoint, got {name!r}: {error}") from error
    if "model_type" not in saved:
        found = f"no model_type in its {CONFIG_NAME}" if saved else f"no {CONFIG_NAME} in {name}"
        if not saved and Path(name).is_dir():
            found += f", {contents(Path(name))}"
        raise ValueError(f"model must be a decoder or Quiet-STaR checkpoint, got {found}")
    is_ours = saved["model_type"] == QuietStarConfig.model_type or "max_thoughts" in saved
    if not is_ours:
        check_decoder("model", AutoConfig.from_pretrained(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer or name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer must be given: none in {model_args.tokenizer or name}: {error}") from error
    options = model_args.config_fields() | {"dtype": model_args.dtype or "auto"}
    if is_ours:
        _refuse_for_trained_embeddings(model_args)
    initial_token_ids = _initial_token_ids(model_args.initial_text, tokenizer)
    try:
        if is_ours:
            model = QuietStarForCausalLM.from_pretrained(name, **options)
            check_tokenizer(tokenizer, model.config)
            return model, tokenizer
        model = QuietStarForCausalLM.from_base(name, tokenizer, initial_token_ids=initial_token_ids, **options)
        return model, tokenizer
    except (RuntimeError, SafetensorError) as error:  # a truncated file, or tensors of other shapes
        raise ValueError(f"model cannot be loaded from {name}: {error}") from error


def _refuse_for_trained_embeddings(model_args: ModelArguments) -> None:
    """Refuse flags that initialise thought embeddings for a checkpoint that already has them."""
    for name in ("embedding_scale", "initial_text"):
        if (value := getattr(model_args, name)) is not None:
            raise ValueError(
                f"{name} must be left out with a Quiet-STaR checkpoint, which has thought embeddings, got {value!r} "
                f"with {model_args.model}"
            )


def _initial_token_ids(text: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Return the tokens of the text that initialises the thought embeddings; None for the default."""
    if text is None:
        return None
    if not (ids := tokenizer.encode(text, add_special_tokens=False)):
        raise ValueError(f"initial_text must hold at least one token, got {text!r}")
    unknown = tokenizer.unk_token
    if unknown is not None and tokenizer.unk_token_id in ids and unknown not in text:
        raise ValueError(f"initial_text must hold no token unknown to the tokenizer, got {text!r}")
    return ids


def _checkpoint_to_resume(training_args: PaperTrainingArguments) -> str | None:
    """Return the checkpoint to resume from, if any, after checking that the run may write into ``output_dir``."""
    wanted, output_dir = training_args.resume_from_checkpoint, training_args.output_dir
    resume = None if wanted is None else to_resume(wanted, output_dir, training_args.save_only_model)
    check_output_dir(output_dir, resume, training_args.overwrite_output_dir)
    if wanted == "last" and (newest := checkpoints(output_dir)[-1]) != Path(resume):
        broken = fault(newest, training_args.save_only_model)
        print(f"quietstar train: {newest} is not whole ({broken}); going on from {resume}", file=sys.stderr)
    return resume
