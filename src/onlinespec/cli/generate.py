"""The command `onlinespec generate`: streams one answer, then prints its statistics."""

from __future__ import annotations

import sys

from onlinespec.cli.checks import check_save, checked_learner, load, save, use
from onlinespec.cli.commands import Generate
from onlinespec.cli.terminal import err, raise_on_ctrl_c
from onlinespec.core import DecodeStats
from onlinespec.drafters.loading import load_drafter
from onlinespec.engine.step import DecodeLoop
from onlinespec.learners.losses import describe_loss
from onlinespec.learning.footprint import MemoryBeside
from onlinespec.learning.update import InlineLearning
from onlinespec.registry import FROZEN


def generate(command: Generate) -> int:
    """Checks the settings, loads the models and answers the prompt.

    Returns:
        The exit status.

    Raises:
        ValueError: for settings that can't work, or an empty prompt.
        KeyboardInterrupt, BrokenPipeError: if Ctrl-C or a closed pipe ended the answer, after everything was saved.
    """
    use(command.machine)
    config = checked_learner(command.learner, command.learning)
    check_save(command.save, config)
    prompt = sys.stdin.read().removesuffix("\n") if command.prompt == "-" else command.prompt
    if not prompt.strip():
        source = "standard input" if command.prompt == "-" else "--prompt"
        raise ValueError(f"the prompt is empty: {source} holds no text; give some")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python decodes bytes that are not UTF-8
        raise ValueError("the prompt is not UTF-8 text; convert it first")

    learners = [config] if config and config.learner != FROZEN else []
    target = load(command.target, command.machine, MemoryBeside(command.drafter_name if config else None, learners))
    if config is None:
        return _answer(command, DecodeLoop(target), None, prompt)
    drafter = load_drafter(command.drafter_name, target, command.machine.seed, command.learning.tuning())
    if config.learner != FROZEN and not drafter.is_trainable:
        raise ValueError(f"drafter {command.drafter_name} does not learn; leave out --learner {command.learner}")
    learning = InlineLearning(drafter, config=config, seed=command.machine.seed)
    return _answer(command, DecodeLoop(target, drafter, learning), learning, prompt)


@raise_on_ctrl_c()
def _answer(command: Generate, loop: DecodeLoop, learning: InlineLearning | None, prompt: str) -> int:
    """Streams one answer to standard output, statistics to standard error. After Ctrl-C the drafter is still saved."""
    target = loop.target
    prompt_ids = target.encode(prompt, is_chat=not command.raw)
    stats = DecodeStats()
    stopped: BaseException | None = None
    try:
        for request in loop.generate(prompt_ids, command.params(target.sampling)):
            stats = request.stats
            sys.stdout.write(request.text.take())  # rich would turn tabs into spaces
            sys.stdout.flush()
        print(flush=True)
    except (KeyboardInterrupt, BrokenPipeError) as reason:
        stopped = reason
        err.print()
    num_rounds = learning.num_rounds if learning else 0
    _print_figures(stats, num_rounds)
    if learning and num_rounds:
        temperature = command.params(target.sampling).sampling.temperature
        err.print(f"learned by the loss {describe_loss(learning.config.loss, temperature)}", highlight=False)
    if command.save and loop.drafter:
        whose = f"drafter (weights version {loop.drafter.weights.version})"
        save(loop.drafter, command.save, num_rounds > 0, whose)
    if stopped:
        raise stopped
    return 0


def _print_figures(stats: DecodeStats, num_rounds: int) -> None:
    if stats.tokens:
        err.print(
            f"{stats.tokens} tokens in {stats.steps} steps, acceptance length {stats.acceptance_length:.2f}, "
            f"{stats.tokens_per_second:.0f} tokens/s (decoding {stats.decode_seconds:.2f} s, "
            f"learning {stats.learn_seconds:.2f} s in {num_rounds} round{'s' * (num_rounds != 1)})",
            highlight=False,
            soft_wrap=True,
        )
