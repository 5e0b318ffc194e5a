"""
Would the tests notice? In a copy of the repository, flips one sign, factor or index of an equation at a time, and runs
tests of which one should then fail, by an assertion: `python tests/mutations.py [word ...]`, with parts of a method or
of a file; all without. Ends with 1 if a flip survives.
"""

import compileall
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import NamedTuple
from xml.etree import ElementTree


ROOT = Path(__file__).resolve().parent.parent

# Method; a file of hf_mlopt/ and who should notice: a file of tests/, or a function in it; and what becomes what.
TABLE = r"""
MoE-Pruner
  pruning/scores.py | test_pruning_scores.py
    mul_(second_ED.sqrt().float() => mul_(second_ED.float()
    inverse_EO1 + inverse_E1D => inverse_EO1 - inverse_E1D
  pruning/scores.py | test_pruning_sweep.py::test_gate_power_zero_ignores_the_router
    "moe-pruner": MethodSpec(wanda, gated=True) => "moe-pruner": MethodSpec(wanda)
  pruning/moments.py | test_pruning_moments.py::test_moments_equal_brute_force
    weight_TK.pow(2 * self.gate_power) => weight_TK.pow(self.gate_power)
    (routed.intermediate_SI).mul_(square_S[:, None]) => (routed.intermediate_SI)
  pruning/moments.py | test_pruning_moments.py::test_what_stands_in_padding_never_changes_the_moments
    square_TK * real_T[:, None], => square_TK,
  pruning/patterns.py | test_pruning_patterns.py
    rank < group - kept => rank < kept
    cumsum(dim=-1, dtype=torch.int32) <= room => cumsum(dim=-1, dtype=torch.int32) < room
expert-wise distillation
  distillation/losses.py | test_distillation_losses.py
    clamp(min=1) * hidden_size => clamp(min=1)
    F.kl_div(student_TV, teacher_TV => F.kl_div(teacher_TV, student_TV
  distillation/trainer.py | test_distillation_trainer.py::test_a_step_is_the_literal_twins
    share + (self.lmbda or 0.0) * mse_L => share - (self.lmbda or 0.0) * mse_L
    values["ce"] / error => error / values["ce"]
  distillation/trainer.py | test_distillation_trainer_ranks.py::test_two_processes_are_one
    loss = share * ranks => loss = share
  distillation/expert_training.py | test_distillation_layerwise.py
    (step + 1) / (warmup + 1) => step / (warmup + 1)
    parameter.grad.masked_fill_(zeros, 0) => parameter.grad.masked_fill(zeros, 0)
  distillation/layerwise.py | test_distillation_layerwise.py
    self.states[number] = output.to => self.states[number] = state.to
RSGD(m)
  optimizers/rsgd.py | test_optimizers_rsgd.py
    wide_w.add_(m, alpha=-lr * (1 - held * rho) => wide_w.add_(m, alpha=-lr * (1 + held * rho)
    (piece["residual"], alpha=-held * (1 - rho) => (piece["residual"], alpha=held * (1 - rho)
    rho, held = group["residual"], 1 - group => rho, held = group["residual"], group
    group["momentum"], 1.0, m) => group["momentum"], 1 - group["momentum"], m)
    (new - e).mul_(1 - group["detach"]) => (e - new).mul_(1 - group["detach"])
    detach * state["residual_scale"] => (1 - detach) * state["residual_scale"]
  optimizers/rsgd_wrapper.py | test_optimizers_rsgd_wrapper.py
    sub_(e, alpha=1 - rho) => sub_(e, alpha=rho)
DOMO
  optimizers/domo.py | test_optimizers_domo.py
    change.sub_(m, alpha=group["fusion"] => change.add_(m, alpha=group["fusion"]
    state["server_param"] - state["server_momentum_buffer"] => state["server_param"] + state["server_momentum_buffer"]
    group["last_lr_sum"] if group => group["lr_sum"] if group
    add_(change, alpha=1 / scale) => add_(change)
    ["server_param"].sub_(m, alpha=group["server_lr"] * scale) => ["server_param"].sub_(m, alpha=scale)
    group["lr"], -group["fusion"] => group["lr"], group["fusion"]
  training/local_steps.py | test_training_local_steps.py::test_silos_weigh_by_their_examples
    own["examples"] / sum(other["examples"] for other in everyone) => 1 / len(everyone)
BinGrad, ORQ
  communication/quantizers/bingrad.py | test_communication_quantizers.py::test_errors_are_those_on_record
    mean_N + (spread_N + residual_N) => mean_N - (spread_N + residual_N)
    mean_N - (spread_N - residual_N) => mean_N + (spread_N - residual_N)
    (2 * above_N.clamp(min=1)) => above_N.clamp(min=1)
  communication/quantizers/orq_levels.py | test_communication_levels.py::test_the_count_rule_finds_the_best_entry
    (sum_NK - count_NK * low_NK) => (sum_NK - count_NK * high_NK)
    (count_NK - 1 - right_NK.floor()) => (count_NK - right_NK.floor())
  communication/quantizers/orq_levels.py | test_communication_levels.py::test_the_end_rule_finds_the_best_ends
    2 * (sum_N2 - count_N2 * points => (sum_N2 - count_N2 * points
    (sum_N2 - inside_N2 / 2) => (sum_N2 + inside_N2 / 2)
  communication/quantizers/rounding.py | test_communication_rounding.py
    (value, border, out=flag) => (border, value, out=flag)
step-ahead error feedback
  communication/saef.py | test_communication_saef.py::test_listing
    delta.add_(_residual(parameter, state, "residual")) => delta.sub_(_residual(parameter, state, "residual"))
    torch.sub(state["x"], state["residual"] => torch.add(state["x"], state["residual"]
    unsent = delta.sub_(reply.sent) => unsent = delta.neg_().add_(reply.sent)
    (t + 1) % group["average_period"] => t % group["average_period"]
  communication/saef_exchange.py | test_communication_saef.py::test_listing
    torch.sub(mean, decoded, out=server) => torch.sub(decoded, mean, out=server)
  communication/step_ahead.py | test_communication_feedback.py::test_the_hook_is_the_authors_listing_to_the_bit
    parameter.sub_(unsent => parameter.add_(unsent
  communication/step_ahead.py | test_communication_feedback.py::test_the_reach_of_sgd_is_what_a_late_gradient_moves
    / (1 - group["momentum"]) => / (1 + group["momentum"])
  communication/hook.py | test_communication_feedback.py::test_the_hook_is_the_authors_listing_to_the_bit
    unsent = flat.sub(result.sent) => unsent = result.sent.sub(flat)
DSP
  pipeline/schedule.py | test_pipeline_schedule.py
    n - self.m[k]) => n - self.m[k] + 1)
    m - after - p for => m - after + p for
    (2 * c + late) / tau => (c + late) / tau
  pipeline/prediction.py | test_pipeline_runtime.py::test_weights_predicted_by_momentum
    beta * (1 - beta**ahead) => (1 - beta**ahead)
    neg_().add_(parameter) => sub_(parameter)
  pipeline/worker.py | test_pipeline_runtime.py::test_the_runtime_equals_the_index_form_bit_for_bit
    self.schedule.m[self.index] or self.forwards => self.schedule.m[self.index] - 1 or self.forwards
    1.0 / (end - first) => 1.0
  pipeline/worker.py | test_pipeline_runtime.py::test_weights_predicted_by_momentum
    self.updates.before(n) - self.num_updates => self.updates.before(n) - self.num_updates + 1
  pipeline/clipping.py | test_pipeline_runtime.py::test_clipping
    end <= n - self.lag => end < n - self.lag
  pipeline/stage.py | test_pipeline_stage.py
    self._call(n, flight.boundary, flight.batch => self._call(n + 1, flight.boundary, flight.batch
federated averages and corrections
  federated/algorithms/averaging.py | test_federated_algorithms.py
    if weighting == "samples" => if weighting != "samples"
  federated/algorithms/fedprox.py | test_federated_algorithms.py
    g + mu * => g - mu *
  federated/algorithms/scaffold.py | test_federated_algorithms.py
    g + (control[name] - own_control[name]) => g - (control[name] - own_control[name])
    .double() - c.double() => .double() + c.double()
    1 / len(self.sites) => 1 / len(shares)
  federated/algorithms/domo.py | test_federated_algorithms.py
    (y - mean) / scale => (mean - y) / scale
    mean + self.fusion * lr_sum * m => mean - self.fusion * lr_sum * m
    x - lr * fusion => x + lr * fusion
FedSM
  federated/algorithms/soft_pull.py | test_fedsm.py
    (pull - b) * end => pull * end
    b = (1 - pull) / (num_sites - 1) => b = (1 - pull) / num_sites
  federated/algorithms/routing.py | test_fedsm.py
    best > threshold => best >= threshold
  federated/algorithms/image_features.py | test_fedsm.py
    - some["count"] * mean[:, None] * mean => + some["count"] * mean[:, None] * mean
    -0.5 * self.distances => -self.distances
Auto-FedRL
  federated/algorithms/reinforce.py | test_auto_fedrl.py
    1 - loss_now / loss_before => loss_now / loss_before - 1
    [reward - mean for => [reward for
    objective + advantage * log_prob => objective - advantage * log_prob
  federated/algorithms/policy_learner.py | test_auto_fedrl.py
    a.round + 1 > round - self.window => a.round > round - self.window
  federated/algorithms/auto_fedrl.py | test_auto_fedrl.py
    w.double() + factor * => w.double() - factor *
secure_sum
  secure_sum/masks.py | test_secure_sum.py
    np.subtract if negative else np.add => np.add
  secure_sum/pairwise.py | test_secure_sum.py
    negative=other < self.name => negative=other > self.name
  secure_sum/fixed_point.py | test_secure_sum.py
    astype(np.float64), -self.fraction_bits => astype(np.float64), 1 - self.fraction_bits
  federated/privacy/masking.py | test_federated_secure_sum.py::test_masked_rounds_equal_plain_ones
    float(num_samples), "uniform" => float(num_samples) ** 2, "uniform"
  federated/privacy/masking.py | test_fedsm_masked.py::test_every_part_has_its_own_weights_and_digits_enough
    coarse + rest / _FURTHER => coarse - rest / _FURTHER
AFSGD-VP, SVRG, SAGA
  vertical/updates/losses.py | test_vertical_updates.py
    expit(-labels * z[:, 0]) => expit(labels * z[:, 0])
  vertical/updates/sgd.py | test_vertical_updates.py
    batch.backward(theta) / len(batch.rows) => batch.backward(theta) / self.block.num_rows
  vertical/updates/svrg.py | test_vertical_updates.py
    theta - self.theta[batch.rows] => theta + self.theta[batch.rows]
  vertical/updates/saga.py | test_vertical_updates.py
    theta - self.table[batch.rows] => theta + self.table[batch.rows]
    self.table[batch.rows] = theta => self.table[batch.rows] = -theta
    back / self.block.num_rows => back / len(batch.rows)
  vertical/updates/weights.py | test_vertical_updates.py
    shrink * self.ramp + learning_rate => self.ramp + learning_rate
    change += self.ramp * => change -= self.ramp *
  vertical/updates/compensation.py | test_vertical_updates.py
    most_updates / updates => updates / most_updates
  vertical/barrier.py | test_vertical_parties.py::test_synchronous_parties_equal_one_machine
    epoch > self.anchors.number => epoch > self.anchors.number + 1
  vertical/anchor.py | test_vertical_parties.py::test_an_anchor_is_asked_for_after_every_pass
    self.steps < len(self.block.batches) => self.steps <= len(self.block.batches)
"""


class Flip(NamedTuple):
    """What becomes what in a file, and the tests that should notice."""

    method: str
    path: str
    tests: str
    before: str
    after: str


def flips() -> list[Flip]:
    """The rows of the table, with paths from the root."""
    found, method, path, tests = [], "", "", ""
    for line in filter(None, TABLE.splitlines()):
        if " => " in line:
            found.append(Flip(method, path, tests, *line.strip().split(" => ")))
        elif " | " in line:
            file, test = line.strip().split(" | ")
            path, tests = f"hf_mlopt/{file}", f"tests/{test}"
        else:
            method = line
    return found


@contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    """What git tracks, as it is in the working tree."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="hf_mlopt_mutations_") as folder:
        copy = Path(folder) / "main"
        for name in filter(None, names.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        # By hash: by time and size, the bytecode of one flip would be taken for that of the next.
        compileall.compile_dir(copy / "hf_mlopt", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        yield copy


def first_failure(copy: Path, tests: Iterable[str]) -> tuple[str, str] | None:
    """
    Runs tests in the copy, in a fork of this process: libraries are imported once, and the package every time.

    Returns:
        `tuple[str, str]`, *optional*: Id and traceback of the first test that fails; None if all pass.
    """
    import pytest

    report, output = copy / "report.xml", copy / "output.txt"
    child = os.fork()
    if child == 0:
        os.chdir(copy)
        sys.path[0] = str(copy)
        os.environ["PYTHONPATH"] = str(copy)
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 1):
        raise RuntimeError(f"tests could not be run, {code}:\n{output.read_text()}")
    for case in ElementTree.parse(report).iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            return f"{case.get('classname').removeprefix('tests.')}::{case.get('name')}", problem.text
    return None


def caught_by(copy: Path, flip: Flip) -> str | None:
    """The test whose assertion fails; None if all pass, or one fails in another way."""
    path = copy / flip.path
    text = path.read_text(encoding="utf-8")
    if text.count(flip.before) != 1:
        raise RuntimeError(f"{flip.path}: {flip.before} is there {text.count(flip.before)} times, not once")
    path.write_text(text.replace(flip.before, flip.after), encoding="utf-8")
    failure = first_failure(copy, [flip.tests])
    path.write_text(text, encoding="utf-8")
    if failure is None or not any(sign in failure[1] for sign in ("AssertionError", "DID NOT RAISE")):
        print(failure[1] if failure else "all pass")
        return None
    return failure[0]


def main(words: list[str]) -> int:
    """Tries the flips of these methods and files; the number of those that survive."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    import transformers

    transformers.Trainer  # noqa: B018  imported when asked for
    chosen = [flip for flip in flips() if not words or any(word in flip.method + flip.path for word in words)]
    survived = 0
    with copy_of_the_repository() as copy:
        if failure := first_failure(copy, sorted({flip.tests for flip in chosen})):
            raise RuntimeError(f"fails without a flip: {failure[0]}\n{failure[1]}")
        for flip in chosen:
            test = caught_by(copy, flip)
            survived += test is None
            outcome = f"caught by {test}" if test else "SURVIVED"
            print(f"{flip.method}: {flip.path}: {flip.before} => {flip.after}: {outcome}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} flips caught")
    return survived


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
