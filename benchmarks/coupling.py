"""What coupled sampling costs: drafts kept under it and under the papers' rejection rule, and the time of the noise.

Counts, not times, but for the noise: the same prompts and seeds are decoded under both rules with the same drafter, at
a fixed number of drafted tokens, and acceptance lengths are compared with 95 % intervals from bootstrapped prompts.

    python benchmarks/coupling.py --num-prompts 24
    python benchmarks/coupling.py --drafters demo --learners frozen --data builtin:sql --temperatures 1
    python benchmarks/coupling.py --noise
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from itertools import islice, product
from random import Random

import torch

import onlinespec as osp
from onlinespec.lossless.noise import Noise, gumbel
from onlinespec.lossless.rejection import Rejection
from onlinespec.lossless.verify import Coupled

VOCABULARIES = (4_096, 49_152, 151_936)


def steps_of(target, drafter_name, learner, prompts, temperature, rule, num_draft_tokens):
    """(accepted, steps) of every prompt."""
    drafter = osp.load_drafter(drafter_name, target)
    learning = osp.InlineLearning(drafter, config=osp.parse_learner(learner)) if drafter.is_trainable else None
    loop = osp.DecodeLoop(target, drafter, learning, rule=rule)
    params = osp.GenerationParams(96, num_draft_tokens, osp.SamplingParams(temperature))
    stats = [loop.complete(target.encode(p.text), replace(params, seed=i)).stats for i, p in enumerate(prompts)]
    return [(one.accepted, one.steps) for one in stats]


def length_of(counts):
    return 1 + sum(accepted for accepted, _ in counts) / sum(steps for _, steps in counts)


def ratio_interval(coupled, rejection, seed=0):
    """Of acceptance lengths; prompts are drawn anew, the same under both rules."""
    rng, ratios = Random(seed), []
    for _ in range(1000):
        chosen = [rng.randrange(len(coupled)) for _ in coupled]
        ratios.append(length_of([coupled[i] for i in chosen]) / length_of([rejection[i] for i in chosen]))
    ratios.sort()
    return ratios[25], ratios[-26]


def table(drafters, learners, data, temperatures, num_prompts, num_draft_tokens):
    target = osp.load_target("demo")
    print(f"| drafter | data | T | rejection | coupled | ratio (95 %), {num_prompts} prompts, K = {num_draft_tokens} |")
    print("|---|---|---|---|---|---|")
    for learner, name, data_name in product(learners, drafters, data):
        if learner != "frozen" and not osp.load_drafter(name, target).is_trainable:
            continue
        prompts = list(islice(osp.load_workload(data_name).prompts(1), num_prompts))
        for temperature in temperatures:
            coupled, rejection = (
                steps_of(target, name, learner, prompts, temperature, rule, num_draft_tokens)
                for rule in (Coupled(), Rejection())
            )
            low, high = ratio_interval(coupled, rejection)
            lengths = length_of(rejection), length_of(coupled)
            figures = f"{lengths[0]:.3f} | {lengths[1]:.3f} | {lengths[1] / lengths[0]:.3f} ({low:.3f}-{high:.3f})"
            print(f"| {name}, {learner} | {data_name} | {temperature} | {figures} |", flush=True)


def noise_costs(repeats=40):
    """Processor time, which other programs hardly touch."""
    print("| vocabulary | making a position's numbers, us | noise of all tokens, us | of 1,024 tokens, us |")
    print("|---|---|---|---|")
    for vocab_size in VOCABULARIES:
        noise, some = Noise(1, 0, vocab_size), torch.arange(0, vocab_size, vocab_size // 1024)[:1024]
        works = (
            lambda at, noise=noise: noise.row(at),
            lambda at, noise=noise: gumbel(noise.row(0)),
            lambda at, noise=noise, some=some: gumbel(noise.row(0)[some]),
        )
        seconds = []
        for work in works:
            work(10_000)
            began = time.process_time()
            for at in range(repeats):
                work(at)
            seconds.append((time.process_time() - began) / repeats)
        print(f"| {vocab_size:,} | " + " | ".join(f"{1e6 * s:.0f}" for s in seconds) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafters", nargs="+", default=["demo", "demo/small_lm", "ngram"])
    parser.add_argument("--learners", nargs="+", default=["frozen", "online_gradient"])
    parser.add_argument("--data", nargs="+", default=["builtin:prose", "builtin:code", "builtin:sql"])
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.6, 0.8, 1.0])
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--noise", action="store_true", help="the time of the noise instead")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    noise_costs() if arguments.pop("noise") else table(**arguments)
