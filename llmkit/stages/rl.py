"""`llmkit rl`: train a policy on rollouts, attempts at problems, weighted by their rewards."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from llmkit.config import (
    DECAY_FRACTION,
    MICRO_BATCH_TOKENS,
    GoldConfig,
    ServedConfig,
    TaskConfig,
    ToolConfig,
    TuningConfig,
    argument,
    option,
    parse_columns,
)
from llmkit.errors import UserError
from llmkit.io.jsonl import input_files
from llmkit.io.metrics import METRICS, last_figures, read_metrics
from llmkit.io.progress import counted, quantity, say
from llmkit.io.run_folder import check_model_folder

if TYPE_CHECKING:
    from llmkit.generation.sampler import Sampler
    from llmkit.rl.problems import EncodedProblem
    from llmkit.rl.rollouts import Rollout
    from llmkit.training.run import Run
    from llmkit.training.trainer import Trainer

# AdamW, width of 256; docs/experiments.md, "Reinforcement learning"
LEARNING_RATE, LORA_LEARNING_RATE = 2e-4, 1e-3
CONCURRENCY = 64  # requests; a server queues those that it cannot batch
ATTEMPT_BYTES = 100  # per token of a rollout: id and log-probabilities, as Python objects
RESULTS = ("reward", "success", "val_reward", "val_success", "val_gold")


@dataclass(frozen=True, kw_only=True)
class RlConfig(TuningConfig, TaskConfig, ToolConfig, ServedConfig, GoldConfig):
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

        A problem is {"prompt", "answer"}; question, solution, messages and GSM8K's #### are read as well. Rewards are
        verifier, rm:FOLDER, cmd:COMMAND, py:FILE.py:FUNCTION, format:REGEX and length (docs/rewards.md). rollouts.jsonl
        has every rollout with its reward.
    """
    following: ClassVar[str] = "llmkit sample policy/ --chat"

    model: str | None = argument("Model folder: an assistant, or a base model.", metavar="MODEL", default=None)
    data: tuple[str, ...] = option((), "Problems; repeatable [stdin].", metavar="FILE", reads=True)
    val: tuple[str, ...] = option((), "Held-out problems.", metavar="FILE", reads=True)
    reward: tuple[str, ...] = option(("verifier",), "Reward; repeatable.", metavar="KIND[:WEIGHT]", reads=True)

    algo: str = option(
        "grpo",
        "Algorithm: advantage and loss.",
        group="Algorithm",
        choices=("grpo", "dr-grpo", "dapo", "rloo", "reinforce++", "gspo"),
    )
    updates: int = option(1, "Updates per step, on the same rollouts.", group="Algorithm", at_least=1, at_most=100)
    kl_coef: float | None = option(
        None, "KL coefficient [0; 0.05 with rm:].", group="Algorithm", at_least=0, at_most=1000
    )

    group: int = option(8, "Rollouts per problem.", group="Rollouts", at_least=1, at_most=4096)
    batch_size: int = option(16, "Problems per step.", group="Rollouts", at_least=1)
    max_tokens: int | None = option(
        None, "Tokens per rollout [by the data's answers, at least 256].", group="Rollouts", unit="count", at_least=1
    )
    temperature: float = option(1.0, "Sampling temperature.", group="Rollouts", at_least=0.05, at_most=10)
    stop: tuple[str, ...] = option((), "Stop sequence; repeatable.", group="Rollouts", metavar="TEXT")
    system: str | None = option(None, "System message for problems without one.", group="Rollouts")

    max_kl: float | None = option(
        None, "KL from MODEL that ends the run, in nats per rollout.", group="Watch", above=0, free=True
    )
    eval_samples: int = option(1, "Samples per held-out problem; with 1, greedy decoding.", group="Watch", at_least=1)

    time_budget: float | None = option(None, "Wall-clock limit.", group="Horizon", unit="duration", above=0)

    # options of other stages that are fixed here
    concurrency: int = CONCURRENCY
    compile: str = "off"  # never tried; rows differ in length from step to step
    micro_batch_size: None = None
    sample_every: None = None  # rollouts.jsonl has every attempt
    warmup_steps: None = None
    weight_decay: float = 0.0
    max_tool_calls: int = 8

    def reads_stdin(self) -> bool:
        """True if stdin is the input."""
        return not self.data or "-" in self.data


@dataclass(frozen=True)
class Summary:
    """Figures that the command prints; `success` is the last step's share of right rollouts, with a verifier."""

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
    tasks: dict[str, float] | None = None  # the last scores of --evaluate
    stopped: str | None = None
    bad_records: int = 0
    not_used: dict[str, int] | None = None


def run(config: RlConfig) -> Summary | None:
    """Load, build, learn, save, summarise. Raises UserError for the user's mistakes, Interrupted after a signal."""
    from llmkit.training.run import Run

    _check(config)
    run = Run("rl", config, "policy/")
    if results := run.finished():
        return Summary(**results)
    with ExitStack() as stack:
        learner = Learner(config, run)
        learner.load(stack)
        if config.dry_run:
            return learner.rehearse()
        learner.learn()
        return learner.save()


class Learner:
    """The loop: sample rollouts of the policy, reward them, train on them.

    group  number of the next group of rollouts
    ended  why there is nothing more to learn, in words
    spent  seconds of sampling and judging in this step
    """

    def __init__(self, config: RlConfig, run: Run) -> None:
        self.config, self.run, self.group, self.ended = config, run, 0, ""
        self.spent: defaultdict[str, float] = defaultdict(float)

    def load(self, stack: ExitStack) -> None:
        """Load rewards, the policy and problems, and choose how it learns."""
        from llmkit.evaluation.evaluator import TaskScores
        from llmkit.generation.tool_calls import open_tools
        from llmkit.rl.algorithms import ALGORITHMS, choose_horizon
        from llmkit.rl.policy import OwnPolicy, ServedPolicy, load_policy, reference_of
        from llmkit.rl.policy_loss import PolicyLoss
        from llmkit.rl.problems import load_problems, report_overlap
        from llmkit.tokenizer.templates import choose_thinking

        config, run, model = self.config, self.run, str(self.config.model)
        run.join()
        if config.is_served and run.world.size > 1:
            raise UserError("--engine: runs in one process; start it without torchrun")
        self._load_rewards(stack)  # before the model: their names may be wrong
        tuning = load_policy(model, config.system, run.device, run.dtype, config.quantize, config.backend, config.quiet)
        choose_thinking(tuning.tokenizer, config.thinking)
        self.tasks = TaskScores(config.evaluate, tuning.tokenizer, chat=tuning.is_assistant)
        self.tools = open_tools(config, tuning.tokenizer, stack, tuning.model.config.eos_token_ids)
        read = partial(
            load_problems,
            tools=None if config.is_served else self.tools,
            limit=config.limit,
            tuning=tuning,
            system=config.system,
            bad=run.bad,
            quiet=config.quiet,
            columns=parse_columns(config.columns),
        )
        data = input_files(config.data or ("-",))
        self.problems, self.max_tokens = read(data, rewards=self.rewards, max_tokens=config.max_tokens)
        self.held_out: list[EncodedProblem] = []
        if config.val:
            both = [*self.rewards, *self.gold]
            self.held_out, _ = read(input_files(config.val), rewards=both, max_tokens=self.max_tokens)
            report_overlap(self.problems, self.held_out, config.quiet)
        self.algorithm = ALGORITHMS[config.algo]
        self.horizon = choose_horizon(
            self.rewards, len(self.problems), config.batch_size, config.max_steps, config.time_budget, config.kl_coef
        )
        compared = self.horizon.kl_coef or config.max_kl is not None
        self.reference = reference_of(tuning.model, frozen=config.lora_rank is not None) if compared else None
        self.tuning = tuning.with_adapter(config.lora_rank, config.seed)
        self._check_plan()
        self.policy = OwnPolicy(tuning.model, tuning.tokenizer, config.stop, model, self.tools)
        if config.is_served:
            served, folder = config.engine, run.work / "served"
            policy = ServedPolicy(served, tuning, config.timeout, CONCURRENCY, config.stop, folder, self.write_policy)
            self.policy = self.policy if config.dry_run else stack.enter_context(closing(policy))
        self.loss = PolicyLoss(self.algorithm, config.temperature, self.horizon.kl_coef, self.reference is not None)

    def _load_rewards(self, stack: ExitStack) -> None:
        from llmkit.rewards import parse_rewards

        config = self.config
        parse = partial(
            parse_rewards, sandbox=config.sandbox, timeout=config.tool_timeout, device=config.device, dtype=config.dtype
        )
        self.rewards = parse(config.reward)
        self.gold = parse([config.gold] if config.gold else [], flag="--gold")
        for weighted in (*self.rewards, *self.gold):
            stack.callback(weighted.reward.close)
        if {weighted.reward.name for weighted in self.rewards} & {weighted.reward.name for weighted in self.gold}:
            raise UserError(f"--gold {config.gold}: expected a reward that is not trained on")

    def _check_plan(self) -> None:
        """Print the plan. Raises UserError if it does not fit into memory."""
        from llmkit.model.devices import check_batch_memory

        config, horizon, tokens = self.config, self.horizon, self.max_tokens
        attempts = config.batch_size * config.group
        self.tuning.check_memory(tokens, "lower --max-tokens")
        check_batch_memory(attempts * tokens, "lower --batch-size or --group", ATTEMPT_BYTES)
        length = f"{config.time_budget:.0f} s" if horizon.steps is None else counted(horizon.steps, "step")
        total = ", ".join(f"{weighted.weight:g} x {weighted.reward.name}" for weighted in self.rewards)
        say(
            f"{length} of {counted(config.batch_size, 'problem')} out of {len(self.problems):,}, "
            f"{counted(config.group, 'attempt')} each, at most {tokens} tokens; reward: {total}; {config.algo}, KL "
            f"coefficient {horizon.kl_coef:g}; {quantity(self.tuning.trained_parameters)} trained parameters",
            config.quiet,
        )
        if config.batch_size > len(self.problems):
            known = counted(len(self.problems), "problem")
            say(f"--batch-size {config.batch_size}: more than the {known}, so a step repeats some", config.quiet)

    def learn(self) -> None:
        """Sample rollouts and train on them, until the horizon or a reason to stop."""
        from llmkit.rl.algorithms import set_advantages, token_weights
        from llmkit.rl.evaluation import costs, describe, nothing_to_learn
        from llmkit.rl.policy_loss import policy_figures, reference_logprobs
        from llmkit.rl.rollouts import pack_rollouts

        config, run, algorithm, rewards = self.config, self.run, self.algorithm, self.rewards
        self.trainer = trainer = self._begin()
        validate = self.evaluate if self.held_out else None
        session = trainer.session(
            total_steps=self.horizon.steps,
            seconds=run.seconds_left(config.time_budget),
            evaluate=self.tasks.beside(validate, self.tuning.model),
            evaluate_first=True,
        )
        compared, share_prompts = self.reference is not None, run.device.type == "cpu"  # only torch has the mask
        with run.training(trainer), session:
            while trainer.goes_on:
                with trainer.interruptible():
                    self.spent.clear()
                    # draw problems, sample and reward rollouts
                    useful, every = self.sample_groups(trainer.step + 1)
                    if not useful:
                        self.ended = nothing_to_learn(every, rewards, algorithm)
                        break
                    # compare them with the reference, and with each other
                    groups = [[rollout for rollout in group if rollout.judged] for group in useful]
                    rollouts = [rollout for group in groups for rollout in group]
                    if self.reference is not None:
                        reference_logprobs(self.reference, rollouts, config.temperature, share_prompts)
                    set_advantages(algorithm, groups, self.horizon.kl_coef)
                    # pack them into rows, and log them
                    trained = [rollout for rollout in rollouts if rollout.trained]
                    lengths = [rollout.token_count for rollout in trained]
                    weights = token_weights(algorithm.weighting, lengths, self.max_tokens)
                    batch, _ = pack_rollouts(trained, weights.tolist(), self.tuning.pad_id, share_prompts)
                    self.log.write([rollout for group in every for rollout in group])
                    figures = describe(every, rewards) | costs(every, algorithm, self.spent)
                # train
                started = time.monotonic()
                metrics = trainer.train_step(batch)
                seconds = max(time.monotonic() - started, 1e-9)
                figures |= {"batch_tokens": batch.tokens, **policy_figures(trainer.figures, len(trained), compared)}
                figures["training_seconds"] = round(seconds, 3)
                figures["trained_tokens_per_second"] = round(config.updates * batch.tokens / seconds, 1)
                self.watch.note_step(figures)
                if not self.held_out and self.watch.keeps:
                    self.best.keep(trainer.step)
                trainer.end_step(metrics | figures)  # evaluates when due
        self.policy.close()

    def _begin(self) -> Trainer:
        """Begin or resume the run folder, with the trainer, the log of rollouts and the guards."""
        from llmkit.rl.monitor import MOST_DIFFERENCE, Watch
        from llmkit.rl.problems import digest
        from llmkit.rl.rollouts import ROLLOUTS, RolloutLog
        from llmkit.training.finetuning import KeepBest
        from llmkit.training.optimizer import Schedule
        from llmkit.training.trainer import TrainerSettings

        config, run, tuning = self.config, self.run, self.tuning
        run.begin({"the data": digest(self.problems), "what is in --val": digest(self.held_out)})
        self.optimizer = tuning.build_optimizer(
            config.learning_rate, weight_decay=0.0, anchor=LEARNING_RATE, lora_anchor=LORA_LEARNING_RATE
        )
        settings = TrainerSettings(
            MICRO_BATCH_TOKENS,
            updates_per_batch=config.updates,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            memory_advice="lower --max-tokens",
            spike_nats=float("inf"),  # the loss does not measure progress
            shown="reward",
        )
        schedule = Schedule(self.horizon.warmup_steps, DECAY_FRACTION)
        trainer = run.trainer(tuning.model, self.optimizer, schedule, self.loss, settings)
        difference = MOST_DIFFERENCE["a server" if self.config.is_served else str(run.dtype)]
        rows = read_metrics(run.work / METRICS)
        self.watch = Watch(trainer, difference, config.max_kl, rows, stop_on_hack=config.stop_on_hack)
        self.best, self.log = KeepBest(run.work, self.optimizer), RolloutLog(run.work / ROLLOUTS)
        self.group = self.log.trim(trainer.step)
        return trainer

    def sample_groups(self, step: int) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
        """Sample the groups of a step; return those to train on (none without a signal), and all of them."""
        from llmkit.data.batches import shuffled
        from llmkit.rl.algorithms import ROUNDS_WITHOUT_SIGNAL, groups_missing, is_informative, penalise_length, teaches
        from llmkit.rl.rollouts import rewards_of

        wanted, size = self.config.batch_size, len(self.problems)
        sampler = self.policy.sampler(self.config.temperature)
        order = cache(partial(shuffled, size, self.config.seed))  # by epoch
        every: list[list[Rollout]] = []
        useful: list[list[Rollout]] = []
        for _ in range(ROUNDS_WITHOUT_SIGNAL):
            useful, count = [], wanted
            while count > 0:  # replace groups without a signal by those of the next problems
                numbers = range(self.group, self.group + count)
                drawn = [self.problems[order(number // size)[number % size]] for number in numbers]
                groups = self.attempt(drawn, sampler, self.config.group, step=step, first=self.group)
                self.group += count
                if self.algorithm.penalises_length:
                    for rollout in (rollout for group in groups for rollout in group):
                        penalise_length(rollout, self.max_tokens)
                every += groups
                useful += [group for group in groups if teaches(self.algorithm, group)]
                count = groups_missing(wanted, len(useful), len(every))
            if is_informative(rewards_of(rollout for group in useful for rollout in group)):
                break
            useful = []  # all rewards of the batch are equal
        used = {group[0].group for group in useful[:wanted]}
        for rollout in (rollout for group in every for rollout in group):
            rollout.trained &= rollout.group in used
        return useful[:wanted], every

    def attempt(
        self, problems: Sequence[EncodedProblem], sampler: Sampler, group: int, *, step: int, first: int
    ) -> list[list[Rollout]]:
        """Sample and reward a group of rollouts for each problem, numbered from `first`."""
        from llmkit.rl.rollouts import sample_attempts, set_rewards

        started = time.monotonic()
        groups = sample_attempts(problems, sampler, group, self.max_tokens, self.config.seed, first, step, self.tools)
        sampled = time.monotonic()
        set_rewards([rollout for group in groups for rollout in group], self.rewards, self.max_tokens)
        self.spent["sampling"] += sampled - started
        self.spent["judging"] += time.monotonic() - sampled
        return groups

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the held-out problems: `val_reward` and more; with --gold `val_gold` and `val_gold_se`."""
        from llmkit.rl.evaluation import HELD_OUT_GROUP, describe, gold_figures, gold_rewards, write_disagreements

        samples = self.config.eval_samples
        sampler = self.policy.sampler(self.config.temperature if samples > 1 else 0.0)
        groups = self.attempt(self.held_out, sampler, samples, step=0, first=HELD_OUT_GROUP)
        scores = {f"val_{name}": value for name, value in describe(groups, self.rewards).items()}
        if self.gold:
            rollouts = [rollout for group in groups for rollout in group]
            golden = gold_rewards(rollouts, self.gold[0], self.max_tokens)
            scores |= gold_figures(golden, len(groups), self.gold[0].reward.name)
            if self.run.world.leads:
                write_disagreements(self.run.work, rollouts, golden)
        self.watch.note_evaluation(scores)
        self.best.offer(self.trainer.step, scores["val_gold" if self.gold else "val_reward"])
        return scores

    def rehearse(self) -> None:
        """Try one step, for --dry-run: print its rewards and its cost, and change nothing."""
        from llmkit.rl.evaluation import rehearse

        config, rewards, tokens, steps = self.config, self.rewards, self.max_tokens, self.horizon.steps
        some, sampler = self.problems[: config.batch_size], self.policy.sampler(config.temperature)
        groups = self.attempt(some, sampler, config.group, step=0, first=0)
        seconds = sum(self.spent.values())
        for line in rehearse(groups, rewards, self.tuning, self.loss, tokens, seconds, config.updates, steps):
            say(line, config.quiet)

    def write_policy(self, folder: Path) -> None:
        """Write the current policy, in its working precision."""
        from llmkit.model.folder import save_model
        from llmkit.training.finetuning import save_tuned

        save_tuned(self.tuning, self.optimizer.masters(), folder, write=partial(save_model, dtype=self.run.dtype))

    def save(self) -> Summary | None:
        """Print why the loop ended, and on rank 0 write the folder, with the best parameters or the last.

        Raises UserError if no step was made.
        """
        from llmkit.generation.tool_calls import unavailable_notes
        from llmkit.rewards.reward import ModelReward
        from llmkit.rl.evaluation import CURVES
        from llmkit.training.finetuning import save_tuned

        config, run = self.config, self.run
        if self.trainer.step == 0:
            run.abandon()
            raise UserError(self.ended or "no step was made")
        for line in unavailable_notes(run.world.gather(self.tools.unavailable_calls if self.tools else {})):
            say(line, config.quiet)
        if self.ended:
            say(f"stopping after step {self.trainer.step}: {self.ended}")
        if not self.held_out and not self.watch.has_collapsed:
            self.best.forget()
        write = partial(save_tuned, self.tuning, self.best.values())
        if not run.world.leads:
            return None
        figures = last_figures(read_metrics(run.work / METRICS), self.best.step)
        results = {
            "steps": self.trainer.step,
            "attempts": self.group * config.group,
            **{name: figures[name] for name in RESULTS if name in figures},
            "kept_step": self.best.step,
            "tasks": self.trainer.results().get("tasks"),
            "stopped": self.watch.stopped or self.ended or None,
        }
        inputs = [path for path in input_files([*config.data, *config.val]) if path != "-"]
        rewards = [weighted.reward for weighted in (*self.rewards, *self.gold)]
        judges = [reward.folder for reward in rewards if isinstance(reward, ModelReward)]
        parents = [str(config.model), *judges]
        return Summary(**run.finish(results, inputs=inputs, parents=parents, curves=CURVES, write=write))


def _check(config: RlConfig) -> None:
    """Check the options before any work."""
    check_model_folder(config.model, "llmkit rl chat/ --data problems.jsonl")
    evaluates_val = config.eval_every and not config.evaluate
    needing = {"--gold": config.gold, "--eval-every": evaluates_val, "--eval-samples": config.eval_samples > 1}
    if not config.val and any(needing.values()):
        raise UserError(f"{next(flag for flag, given in needing.items() if given)}: needs --val, held-out problems")
    if config.stop_on_hack and not (config.gold and config.eval_every):
        raise UserError("--stop-on-hack: needs --gold, the reward to monitor, and --eval-every")
    if config.is_served and config.tools:
        raise UserError("--tools: cannot be combined with --engine; rl runs tools only when it samples itself")
    input_files([*config.data, *config.val])

    from llmkit.rl.algorithms import check_group  # brings numpy, which --help does without

    check_group(config.algo, config.group, config.batch_size)
