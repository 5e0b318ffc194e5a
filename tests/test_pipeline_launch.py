"""A pipeline as users start it: `accelerate launch`, and a stage that is killed among four."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import environment, free_port
from test_recipes import SMALL_STAGES
from transformers import AutoModelForCausalLM

from hf_mlopt.resources import resource_dir


pytestmark = [pytest.mark.slow, pytest.mark.distributed]
RECIPES = resource_dir("recipes")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_mlopt.pipeline import PipelineTrainer, PipelineTrainingArguments

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=2,
))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(50, (4000, 8))]
args = PipelineTrainingArguments(
    sys.argv[1], pipeline="dsp", use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=20,
    save_strategy="no", max_steps=2000, gradient_accumulation_steps=2, pipeline_timeout=20,
)
trainer = PipelineTrainer(model, args, train_dataset=rows)
trainer.train()
"""


@pytest.mark.parametrize("name", ["gpt2_lag1", "mixtral_dsp"])
def test_recipes_under_accelerate_launch(tmp_path, name):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    model = "gpt2" if name.startswith("gpt2") else "mixtral"
    words = ["--config", RECIPES / "pipeline" / f"{name}.yaml", "--output-dir", tmp_path / "out", "--use-cpu"]
    words += ["--dataset", tmp_path / "text.txt", "--model-config", json.dumps(SMALL_STAGES[model])]
    words += ["--sequence-length", "16", "--vocab-size", "300", "--max-steps", "6", "--disable-tqdm"]
    words += ["--save-strategy", "steps", "--save-steps", "3"]
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        RECIPES / "accelerate" / "cpu2.yaml",
    ]
    command = [*map(str, launch), "-m", "hf_mlopt", "train", *map(str, words)]
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert results["world_size"] == 2 and results["steps"] == 6
    for folder in ("out", "out/checkpoint-3", "out/checkpoint-6"):
        loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and loaded.config.model_type == model


def test_a_stage_that_is_killed_ends_the_other_three(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    port, processes = free_port(), []
    for rank in range(4):
        log = open(tmp_path / f"log{rank}", "w")  # noqa: SIM115  open while the process runs
        command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / "out")]
        own = {**ONE_THREAD, **environment(rank, port, 4), "ACCELERATE_USE_CPU": "true"}
        processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    try:
        end = time.monotonic() + 120
        while "'loss'" not in (tmp_path / "log0").read_text():
            assert time.monotonic() < end and all(process.poll() is None for process in processes)
            time.sleep(0.2)
        processes[2].send_signal(signal.SIGKILL)
        statuses = [process.wait(60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses[2] == -signal.SIGKILL and all(status != 0 for status in statuses), statuses
    said = [(tmp_path / f"log{rank}").read_text() for rank in (0, 1, 3)]
    assert any("stage 2" in text for text in said)
