"""`llmkit rl`: a policy tries problems many times, and learns from the attempts that were worth more than others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmkit.config import (
    DECAY_FRACTION,
    MICRO_BATCH_TOKENS,
    ServedConfig,
    ToolConfig,
    TuningConfig,
    argument,
    option,
)
from llmkit.errors import UserError
from llmkit.io.jsonl import check_inputs, open_output
from llmkit.io.metrics import METRICS, last_figures, read_metrics
from llmkit.io.progress import counted, quantity, say
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from llmkit.rewards import Weighted
    from llmkit.rl.algorithms import Horizon
    from llmkit.rl.served_policy import ServedPolicy
    from llmkit.training.finetuning import Tuning
    from llmkit.training.run import Run

# of AdamW at a width of 256; docs/experiments.md, "Reinforcement learning"
LEARNING_RATE, LORA_LEARNING_RATE = 2e-4, 1e-3
ATTEMPT_BYTES = 100  # a token of an attempt: id and log-probabilities, as Python has them
KEEP_EVERY = 10  # steps between parameters kept against a collapse, where nothing is held out
# usual are 1e-6 and 5e-3 nats a token; another program computes otherwise
DIFFERENCES, SERVED_DIFFERENCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.05}, 0.05
DISAGREEMENTS = 20  # attempts shown that a reward and the gold one differ about
RESULTS = ("reward", "success", "val_reward", "val_success", "val_gold")
CURVES = {
    "reward.svg": {"training": "reward", "held out": "val_reward", "gold": "val_gold"},
    "success.svg": {"training": "success", "held out": "val_success", "calling": "called"},
    "length.svg": {"training": "length", "held out": "val_length"},
}


@dataclass(frozen=True, kw_only=True)
class RlConfig(TuningConfig, ToolConfig, ServedConfig):
    """Options of `llmkit rl`."""

    examples: ClassVar[str] = """
        Examples:
          llmkit rl chat/ --data problems.jsonl --reward verifier -o policy/
          llmkit rl chat/ --data problems.jsonl --val held-out.jsonl --eval-every 10 --algo dapo -o policy/
          llmkit rl chat/ --data prompts.jsonl --reward rm:judge/ --reward length:-0.1 --max-kl 20 -o policy/
          llmkit rl chat/ --data p.jsonl --val v.jsonl --eval-every 5 --reward rm:judge/ --gold verifier \\
            --stop-on-hack -o policy/
          llmkit rl chat/ --data problems.jsonl --engine openai:http://localhost:8000/v1#chat -o policy/
          jq -c 'select(.reward == 1)' policy/rollouts.jsonl | llmkit sft chat/ --data - -o better/

        A problem is {"prompt", "answer"}; also question, solution, messages, GSM8K's ####. Rewards, with weights:
        verifier, rm:FOLDER, cmd:COMMAND, py:FILE.py:FUNCTION, format:REGEX, length (docs/rewards.md). rollouts.jsonl
        records every attempt with its reward.
    """
    following: ClassVar[str] = "llmkit sample policy/ --chat"

    model: str | None = argument("Model folder: an assistant, or a base model.", metavar="MODEL", default=None)
    data: tuple[str, ...] = option((), "Problems; repeatable [stdin].", metavar="FILE", reads=True)
    val: tuple[str, ...] = option((), "Held-out problems.", metavar="FILE", reads=True)
    reward: tuple[str, ...] = option(
        ("verifier",), "Reward of the attempts; repeatable.", metavar="KIND[:WEIGHT]", reads=True
    )

    algo: str = option(
        "grpo",
        "Advantage and loss.",
        group="Algorithm",
        choices=("grpo", "dr-grpo", "dapo", "rloo", "reinforce++", "gspo"),
    )
    updates: int = option(
        1, "Optimizer updates per step, all on the same attempts.", group="Algorithm", at_least=1, at_most=100
    )
    clip_low: float | None = option(
        None, "Lower clip bound: 1 - VALUE [by algorithm].", group="Algorithm", above=0, at_most=1
    )
    clip_high: float | None = option(
        None, "Upper clip bound: 1 + VALUE [by algorithm].", group="Algorithm", above=0, at_most=1000
    )
    kl_coef: float | None = option(
        None, "Weight of the KL divergence from MODEL [0; 0.05 with rm:].", group="Algorithm", at_least=0, at_most=1000
    )
    max_difference: float | None = option(
        None,
        "Largest difference of log-probabilities between sampler and trainer [0.001; bfloat16, a server 0.05].",
        group="Algorithm",
        above=0,
        free=True,
    )

    group: int = option(8, "Attempts per problem.", group="Attempts", at_least=1, at_most=4096)
    batch_size: int = option(16, "Problems per step.", group="Attempts", at_least=1)
    max_tokens: int | None = option(
        None,
        "Tokens per attempt [twice the data's answers, 256 at least, within the context].",
        group="Attempts",
        unit="count",
        at_least=1,
    )
    temperature: float = option(1.0, "Sampling temperature.", group="Attempts", at_least=0.05, at_most=10)
    stop: tuple[str, ...] = option((), "Stop string; repeatable.", group="Attempts", metavar="TEXT")
    system: str | None = option(None, "System message for problems without one.", group="Attempts")
    refill: float = option(
        1.0,
        "Extra batches a step, at most, to replace groups whose rewards are all equal.",
        group="Attempts",
        at_least=0,
    )
    overlong: str = option(
        "auto",
        "Treatment of truncated attempts; auto: by algorithm.",
        group="Attempts",
        choices=("auto", "keep", "mask", "penalise"),
    )
    slots: int = option(64, "Sequences decoded at a time.", group="Attempts", at_least=1, at_most=4096, free=True)
    concurrency: int = option(
        64, "Requests to a server at a time.", group="Servers", at_least=1, at_most=999, free=True
    )

    gold: str | None = option(
        None, "Reward to watch without training on it.", group="Watch", metavar="KIND", reads=True
    )
    stop_on_hack: bool = option(
        False, "Early stop where the reward rises and the gold one falls.", group="Watch", free=True
    )
    max_kl: float | None = option(
        None, "Early stop at this KL from MODEL, in nats per attempt [never].", group="Watch", above=0, free=True
    )
    eval_samples: int = option(1, "Samples per held-out problem; with 1, greedy decoding.", group="Watch", at_least=1)

    epochs: float | None = option(None, "Passes over the problems, without --refill [1].", group="Horizon", above=0)
    time_budget: float | None = option(None, "Wall-clock limit.", group="Horizon", unit="duration", above=0)

    compile: str = "off"  # of the trainer's options: rows differ in length from step to step, and it was never tried

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.data or "-" in self.data


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints. `success` is the share of right attempts in the last step, with verifiers."""

    path: str
    steps: int
    attempts: int
    reward: float
    seconds: float
    success: float | None = None
    val_reward: float | None = None
    val_success: float | None = None
    val_gold: float | None = None
    kept_step: int | None = None
    stopped: str | None = None
    bad_records: int = 0
    not_used: dict[str, int] | None = None


def run(config: RlConfig) -> Summary | None:
    """Load, build, train, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    from llmkit.training.run import Run

    _check(config)
    run = Run("rl", config, "policy/")
    if results := run.finished():
        return Summary(**results)
    with ExitStack() as stack:
        return _run(config, run, stack)


def _run(config: RlConfig, run: Run, stack: ExitStack) -> Summary | None:
    from llmkit.data.overlap import Overlap
    from llmkit.generation.tool_calls import open_tools, told_unavailable
    from llmkit.model.devices import check_batch_memory
    from llmkit.model.folder import save_model
    from llmkit.rewards.reward_models import ModelReward
    from llmkit.rl.actor import Actor
    from llmkit.rl.algorithms import adapted, choose_horizon
    from llmkit.rl.batches import BatchSettings, Collector
    from llmkit.rl.evaluation import HeldOut
    from llmkit.rl.monitor import Limits, Watch
    from llmkit.rl.policy_loss import PolicyLoss
    from llmkit.rl.problems import EncodedProblem, digest, load_problems
    from llmkit.rl.rehearsal import rehearse
    from llmkit.rl.rollouts import ROLLOUTS, RolloutLog, RolloutSettings
    from llmkit.training.finetuning import KeepBest
    from llmkit.training.optimizer import Schedule, warn_of_long_warmup
    from llmkit.training.plan import training_memory
    from llmkit.training.trainer import TrainerSettings

    # load
    run.join()
    if config.is_served and run.world.size > 1:
        raise UserError("--engine: expected one process, for one server gets the weights; start it without torchrun")
    rewards, gold = _rewards(config, stack)  # whose names are looked at before the model is read
    tuning = _load(config, run)

    def write_policy(folder: Path) -> None:
        """Write the policy as it is now, in the precision that it is trained in."""
        tuning.write_tokenizer(folder)
        tuning.save(folder, optimizer.masters(), write=partial(save_model, dtype=run.dtype))

    served = _served(config, run.work, tuning, write_policy, stack) if config.is_served else None
    asked, system, quiet = config.data or ("-",), config.system, config.quiet
    problems, max_tokens = load_problems(
        asked, config.limit, tuning, rewards, system, config.max_tokens, run.bad, quiet
    )
    held_out: list[EncodedProblem] = []
    if config.val:
        judged_by = [*rewards, *gold]
        held_out, _ = load_problems(config.val, config.limit, tuning, judged_by, system, max_tokens, run.bad, quiet)
        overlap = Overlap.of_texts(one.problem.prompt for one in held_out)
        overlap.compare_texts(one.problem.prompt for one in problems)
        overlap.report(quiet)

    # build
    names = ("max_steps", "epochs", "time_budget", "warmup_steps", "kl_coef")
    options = {name: getattr(config, name) for name in names}
    horizon = choose_horizon(rewards, len(problems), config.batch_size, **options)
    algorithm = adapted(config.algo, config.overlong, config.clip_low, config.clip_high)
    reference = None
    if horizon.kl_coef or config.max_kl is not None:
        reference = deepcopy(tuning.model).eval().requires_grad_(False)
    tuning = tuning.with_adapter(config.lora_rank, config.lora_alpha, config.seed)
    attempts = config.batch_size * config.group
    tuning.check_memory(min(config.micro_batch_size or 1, attempts) * max_tokens)
    check_batch_memory(attempts * max_tokens, "lower --batch-size or --group", ATTEMPT_BYTES)
    _say_plan(config, horizon, rewards, len(problems), max_tokens, tuning.trained_parameters)
    warn_of_long_warmup(horizon.warmup_steps, horizon.steps, config.quiet)
    tools = open_tools(config, tuning.tokenizer, stack, tuning.model.config.eos_token_ids)
    made_by = {"tools": tools, "served": None if config.dry_run else served}
    actor = Actor(tuning.model, tuning.tokenizer, rewards, slots=config.slots, name=str(config.model), **made_by)
    loss = PolicyLoss(algorithm, config.temperature, horizon.kl_coef, reference is not None)
    settings = RolloutSettings(config.group, max_tokens, config.temperature, config.stop, config.seed)
    share_prompts = run.device.type == "cpu"
    if config.dry_run:
        some = problems[: config.batch_size]
        rehearsal = rehearse(actor, some, settings, loss, algorithm, MICRO_BATCH_TOKENS, share_prompts)
        memory = sum(training_memory(tuning.model.config, MICRO_BATCH_TOKENS, tuning.trained_parameters))
        memory += run.dtype.itemsize * tuning.model.config.parameter_count * (reference is not None)
        for line in rehearsal.lines(horizon.steps, config.updates, memory):
            say(line, config.quiet)
        return None
    run.begin({"the data": digest(problems), "what is in --val": digest(held_out)})
    collector = Collector(
        actor,
        problems,
        algorithm,
        settings,
        BatchSettings(config.batch_size, config.refill, horizon.kl_coef, share_prompts, config.seed),
        log=RolloutLog(run.work / ROLLOUTS),
        pad=tuning.pad_id,
        reference=reference,
    )
    optimizer = tuning.build_optimizer(
        config.learning_rate, config.weight_decay, anchor=LEARNING_RATE, lora_anchor=LORA_LEARNING_RATE
    )
    best = KeepBest(run.work, optimizer)
    trainer_settings = TrainerSettings(
        config.micro_batch_size or MICRO_BATCH_TOKENS,
        updates_per_batch=config.updates,
        micro_batch_tokens=None if config.micro_batch_size else MICRO_BATCH_TOKENS,
        memory_advice="lower --max-tokens",
        spike_nats=float("inf"),  # this loss does not measure progress
        shown="reward",
    )
    schedule = Schedule(horizon.warmup_steps, DECAY_FRACTION)
    trainer = run.trainer(tuning.model, optimizer, schedule, loss, trainer_settings)
    difference = config.max_difference or (SERVED_DIFFERENCE if served else DIFFERENCES[str(run.dtype)])
    limits = Limits(difference, config.max_kl)
    watch = Watch(trainer, collector, reference is not None, limits, read_metrics(run.work / METRICS))
    likeliest = {} if config.eval_samples > 1 else {"temperature": 0.0}
    how = replace(settings, group_size=config.eval_samples, **likeliest)
    tried = HeldOut(actor, held_out, how, gold[0] if gold else None)
    evaluate_held_out = watch.evaluation(tried, config.stop_on_hack)

    def evaluate() -> dict[str, float]:
        scores = evaluate_held_out()
        best.offer(trainer.step, scores["val_gold" if gold else "val_reward"])
        return scores

    # train
    batches = collector.batches(trainer.step)
    session = trainer.session(
        total_steps=horizon.steps,
        seconds=run.seconds_left(config.time_budget),
        evaluate=evaluate if held_out else None,
        evaluate_first=True,
        sample=collector.example,
    )
    with run.training(trainer), session:
        while trainer.goes_on:
            with trainer.interruptible():
                batch = next(batches, None)
            if batch is None:
                break
            metrics = trainer.train_step(batch) | watch.describe()
            if not held_out and watch.at_its_best and trainer.step % KEEP_EVERY == 0:
                best.keep(trainer.step)
            trainer.end_step(metrics)
    if served is not None:
        served.close()
    if trainer.step == 0:
        run.abandon()
        raise UserError(collector.ended or "no step was made")
    for line in told_unavailable(run.world.gather(tools.unavailable_calls if tools else {})):
        say(line, config.quiet)
    if collector.ended:
        say(f"stopping after step {trainer.step}: {collector.ended}")
    if not held_out and not watch.has_collapsed:
        best.forget()

    # save
    values = best.values()
    if not run.world.leads:
        return None

    def write(folder: Path) -> None:
        if tried.gold_rewards:
            with open_output(str(folder / "disagreements.jsonl"), force=True) as write_record:
                for record in tried.disagreements(DISAGREEMENTS):
                    write_record(record)
        tuning.write_tokenizer(folder)
        tuning.save(folder, values)

    figures = last_figures(read_metrics(run.work / METRICS), best.step)
    results = {
        "steps": trainer.step,
        "attempts": collector.groups * config.group,
        **{name: figures[name] for name in RESULTS if name in figures},
        "kept_step": best.step,
        "stopped": watch.stopped,
    }
    inputs = [path for path in (*config.data, *config.val) if path != "-"]
    judges = [weighted.reward.folder for weighted in (*rewards, *gold) if isinstance(weighted.reward, ModelReward)]
    parents = [str(config.model), *judges]

    # summarise
    return Summary(**run.finish(results, inputs=inputs, parents=parents, curves=CURVES, write=write))


# ---- what is asked for


def _check(config: RlConfig) -> None:
    """Raise UserError for what can be known to be wrong before the work."""
    check_model_folder(config.model, "llmkit rl chat/ --data problems.jsonl")
    if not config.val and (config.gold or config.eval_every):
        raise UserError(f"{'--gold' if config.gold else '--eval-every'}: needs --val, problems to look at")
    if config.stop_on_hack and not (config.gold and config.eval_every):
        raise UserError("--stop-on-hack: needs --gold, a reward to watch, and --eval-every, how often to look")
    if not config.val and config.eval_samples > 1:
        raise UserError("--eval-samples: needs --val, problems to try")
    if config.is_served and config.tools:
        raise UserError("--tools: expected no --engine beside it; tools are called where attempts are made here")
    check_inputs([*config.data, *config.val])

    from llmkit.rl.algorithms import ALGORITHMS, adapted  # brings numpy, which --help does without

    adapted(config.algo, config.overlong, config.clip_low, config.clip_high)
    if config.group == 1 and ALGORITHMS[config.algo].compares_within_groups:
        raise UserError(
            f"--group 1: --algo {config.algo} compares the attempts at a problem with one another and needs 2 or more; "
            "--algo reinforce++ compares those of a step"
        )
    if config.group == config.batch_size == 1:
        raise UserError("--group 1 --batch-size 1: expected two attempts a step at least, to compare")


def _say_plan(
    config: RlConfig, horizon: Horizon, rewards: Sequence[Weighted], problems: int, max_tokens: int, parameters: int
) -> None:
    length = f"{config.time_budget:.0f} s" if horizon.steps is None else counted(horizon.steps, "step")
    parts = ", ".join(f"{weighted.weight:g} x {weighted.reward.name}" for weighted in rewards)
    say(
        f"{length} of {counted(config.batch_size, 'problem')} of {problems:,}, {counted(config.group, 'attempt')} at "
        f"each, of {max_tokens} tokens at most; reward: {parts}; "
        f"{config.algo}, KL weight {horizon.kl_coef:g}; {quantity(parameters)} parameters are trained",
        config.quiet,
    )
    if config.batch_size > problems:
        say(
            f"--batch-size {config.batch_size}: more than the {counted(problems, 'problem')}, so a step repeats some",
            config.quiet,
        )


# ---- model, rewards, problems


def _load(config: RlConfig, run: Run) -> Tuning:
    """The model, which stays what it is: an assistant, or with a warning a base model."""
    from llmkit.training.finetuning import load_unchanged

    tuning = load_unchanged(str(config.model), device=run.device, dtype=run.dtype)
    if not tuning.is_assistant:
        if config.system is not None:
            raise UserError(f"--system: {config.model} is a base model, which knows no turns; tune it by llmkit sft")
        say(
            f"{config.model}: a base model: prompts are continued as text, and an attempt may never stop; "
            "llmkit sft teaches turns, --stop ends attempts at a text",
            config.quiet,
        )
    return tuning


def _rewards(config: RlConfig, stack: ExitStack) -> tuple[list[Weighted], list[Weighted]]:
    """The rewards of training, and that which is watched."""
    from llmkit.rewards import parse_rewards

    details = {"sandbox": config.sandbox, "timeout": config.tool_timeout}
    details |= {"device": config.device, "dtype": config.dtype}
    rewards = parse_rewards(config.reward, **details)
    gold = parse_rewards([config.gold], flag="--gold", **details) if config.gold else []
    for weighted in (*rewards, *gold):
        stack.callback(weighted.reward.close)
    for watched in gold:
        if watched.reward.name in {weighted.reward.name for weighted in rewards}:
            raise UserError(f"--gold {config.gold}: expected a reward that is not trained on")
    return rewards, gold


def _served(
    config: RlConfig, work: Path, tuning: Tuning, write: Callable[[Path], None], stack: ExitStack
) -> ServedPolicy:
    """The server that samples; it is asked whether it is there."""
    from llmkit.generation.generator import end_tokens
    from llmkit.generation.served_models import OpenAIClient, parse_address
    from llmkit.rl.served_policy import ServedPolicy

    server = OpenAIClient(parse_address(config.engine, "--engine"), config.timeout)
    ends, place = end_tokens(tuning.model.config, tuning.tokenizer), work / "served"
    policy = ServedPolicy(
        server, tuning.tokenizer, end_ids=ends, folder=place, write=write, concurrency=config.concurrency
    )
    stack.callback(policy.close)
    return policy
