"""The command: a run of each task with a stop in its middle, and newcomers' errors."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from examples.convert import read_model
from examples.convert.reading import load_model
from examples.finetune.__main__ import main
from examples.finetune.config import FinetuneConfig
from examples.finetune.tasks import make_task
from examples.llama import train
from examples.llama.batches import Position, training_batches
from examples.llama.config import TrainConfig
from examples.llama.model import abstract_model
from examples.llama.step import token_losses
from examples.llama.task import Pretraining
from examples.llama.train import Trainer
from tests.examples.pretrained import write_decoder, write_encoder

COLORS = "red green blue black white pink grey brown gold cyan".split()


def write_lines(path: pathlib.Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversations(folder: pathlib.Path) -> str:
    """Twenty questions, a quarter of them held out."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{color} {number}"},
                {"role": "assistant", "content": color[0] * 2},
            ],
            "split": "dev" if number else "train",
        }
        for color in COLORS
        for number in (0, 0, 0, 1)
    ]
    return write_lines(folder / "chat.jsonl", rows)


def labelled(folder: pathlib.Path) -> str:
    """Which letter a text is made of, told at its first sight."""
    draw = np.random.default_rng(0)
    rows = [
        {"text": "ab"[label] * int(n), "label": ["no", "yes"][label], "split": split}
        for split, size in (("train", 48), ("dev", 16), ("test", 16))
        for label, n in zip(
            draw.integers(0, 2, size), draw.integers(3, 9, size), strict=True
        )
    ]
    return write_lines(folder / "labels.jsonl", rows)


def metrics(run_dir: pathlib.Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


@pytest.mark.whole
def test_instruction_tuning_goes_on_and_exports(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_decoder(tmp_path / "model")
    flags = ["--task", "sft", "--model", model, "--data", conversations(tmp_path)]
    flags += "--optimizer galore --rank 4 --embeddings projected --lr 0.05".split()
    flags += "--seq-len 64 --batch-size 4 --steps 8 --answer-tokens 4".split()
    assert main([*flags, "--run-dir", "whole", "--export", "out"]) == 0
    table = capsys.readouterr().out
    assert "train: 30 documents; dev: 10 documents" in table
    assert re.search(
        r"validation +loss \d\.\d{4} nats over 30 tokens of answers", table
    )
    assert "a step, by the compiler" in table and "asked: red 1" in table
    assert main([*flags, "--run-dir", "parts", "--stop-step", "5"]) == 0
    assert main([*flags, "--run-dir", "parts", "--resume"]) == 0
    resumed = [x for x in metrics(tmp_path / "parts") if "loss" in x or x["step"] != 5]
    assert resumed == metrics(tmp_path / "whole")
    losses = [x["loss"] for x in resumed if "loss" in x]
    assert losses[-1] < 0.8 * losses[0]
    assert "embed/embedding" in (tmp_path / "whole/selection.txt").read_text()
    # What was exported is what was trained, and it begins where the old one did.
    (config, tuned), (_, before) = read_model("out"), read_model(model)
    assert config.tied and (tmp_path / "out/tokenizer.json").exists()
    assert not np.array_equal(tuned["embed"]["embedding"], before["embed"]["embedding"])
    capsys.readouterr()
    again = ["--task", "sft", "--model", "out", *flags[4:], "--run-dir", "again"]
    assert main(again) == 0
    first = metrics(tmp_path / "again")[0]["loss"]
    assert first < losses[0] - 0.2
    # A checkpoint of other data is refused.
    (tmp_path / "chat.jsonl").write_text((tmp_path / "chat.jsonl").read_text() * 2)
    assert main([*flags, "--run-dir", "parts", "--resume"]) == 2
    assert "another configuration (data_hash" in capsys.readouterr().err


@pytest.mark.whole
def test_classification_by_an_adapter_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_encoder(tmp_path / "model")
    flags = ["--task", "classify", "--model", model, "--data", labelled(tmp_path)]
    flags += "--optimizer adamw --adapter lora --lora-rank 2 --lr 0.02".split()
    flags += "--seq-len 16 --batch-size 6 --epochs 4".split()
    assert main([*flags, "--run-dir", "whole", "--export", "out"]) == 0
    table = capsys.readouterr().out
    found = re.search(r"test +accuracy (\S+), f1 (\S+), matthews (\S+)", table)
    assert found is not None and float(found[1]) > 0.9
    trained = re.search(r"trained +([\d,]+)", table)
    # Both factors of q, k, v, o, up and down in two layers, and the head.
    factors = 2 * 2 * (4 * (32 + 32) + 2 * (32 + 48))
    assert trained is not None
    assert int(trained[1].replace(",", "")) == factors + 2 * 32 + 2
    assert main([*flags, "--run-dir", "parts", "--stop-step", "7"]) == 0
    assert main([*flags, "--run-dir", "parts", "--resume"]) == 0
    resumed = [x for x in metrics(tmp_path / "parts") if "loss" in x or x["step"] != 7]
    assert resumed == metrics(tmp_path / "whole")
    # The frozen embedding is as it was, the merged kernels are not.
    (_, tuned), (_, before) = read_model("out"), read_model(model)
    assert np.array_equal(tuned["embed"]["embedding"], before["embed"]["embedding"])
    for name in ("q", "o"):
        a, b = (x["layers"]["attn"][name]["kernel"] for x in (tuned, before))
        assert a.shape == b.shape and not np.array_equal(a, b)


@pytest.mark.whole
def test_the_last_position_of_a_decoder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_decoder(tmp_path / "model")
    flags = ["--task", "classify", "--model", model, "--data", labelled(tmp_path)]
    flags += "--optimizer galore --rank 4 --lr 0.05 --epochs 4".split()
    flags += "--seq-len 16 --batch-size 6 --run-dir run --export out".split()
    assert main(flags) == 0
    found = re.search(r"test +accuracy (\S+),", capsys.readouterr().out)
    assert found is not None and float(found[1]) > 0.9
    exported = load_model("out")
    assert exported.head["score.weight"].shape == (2, 32)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes"}


@pytest.mark.whole
def test_without_a_backward_pass(tmp_path, capsys, monkeypatch):
    """The estimator's subspaces are in the checkpoint, and its noise goes on."""
    monkeypatch.chdir(tmp_path)
    model = write_decoder(tmp_path / "model")
    flags = ["--task", "sft", "--model", model, "--data", conversations(tmp_path)]
    flags += "--gradient subzero --gradient-rank 4 --optimizer sgd --lr 1e-3".split()
    flags += "--warmup 0 --seq-len 32 --batch-size 6 --micro-batches 2".split()
    flags += "--steps 6 --answers 0".split()
    assert main([*flags, "--run-dir", "whole"]) == 0
    assert main([*flags, "--run-dir", "parts", "--stop-step", "3"]) == 0
    assert main([*flags, "--run-dir", "parts", "--resume"]) == 0
    whole = metrics(tmp_path / "whole")
    resumed = [x for x in metrics(tmp_path / "parts") if "loss" in x or x["step"] != 3]
    assert resumed == whole
    # Longer than the gradient by about the root of the number of parameters.
    assert max(x["grad_norm"] for x in whole if "loss" in x) > 100
    other = [*flags, "--run-dir", "parts", "--gradient", "mezo", "--resume"]
    assert main(other) == 2
    assert "gradient: checkpoint 'subzero', now 'mezo'" in capsys.readouterr().err


@pytest.mark.whole
def test_pretraining_goes_on_from_a_folder(micro_preset, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_decoder(tmp_path / "model")
    flags = ["--preset", "micro", "--data", shards, "--init-from", model]
    flags += "--optimizer adamw --lr 1e-9 --steps 2 --eval-every 0".split()
    assert train.main([*flags, "--run-dir", "run"]) == 0
    assert train.main([*flags, "--run-dir", "run", "--resume"]) == 0
    # With so small a learning rate the losses are those of the folder's model.
    config, params = read_model(model)
    text = Pretraining(TrainConfig(preset="micro", data=shards, init_from=model))
    text.read(tmp_path / "run")
    assert text.tokenizer.end == 1 and text.model.tied
    first, _ = next(training_batches(text.rows(True), 4, Position()))
    params = jax.tree.map(jax.numpy.asarray, params)
    losses = token_losses(abstract_model(config)[0], params, first)
    expected = float(np.sum(np.asarray(losses)) / first["mask"].sum())
    found = metrics(tmp_path / "run")
    assert found[0]["loss"] == pytest.approx(expected, 1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    write_decoder(folder / "decoder")
    write_encoder(folder / "encoder")
    for name in ("no-tokenizer", "other", "broken"):
        shutil.copytree(folder / "decoder", folder / name)
    (folder / "no-tokenizer/tokenizer.json").unlink()
    (folder / "broken/tokenizer.json").write_text("{}")
    config = json.loads((folder / "other/config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (folder / "other/config.json").write_text(json.dumps(config))
    (folder / "empty").mkdir()
    conversations(folder)
    labelled(folder)
    chat = [{"prompt": str(n), "response": ""} for n in range(30)]
    write_lines(folder / "silent.jsonl", chat)
    write_lines(folder / "unlabelled.jsonl", [{"text": str(n)} for n in range(30)])
    write_lines(
        folder / "alike.jsonl", [{"text": str(n), "label": 1} for n in range(30)]
    )
    write_lines(
        folder / "long.jsonl",
        [{"prompt": f"{n}" * 90, "response": "b"} for n in range(30)],
    )
    return folder


SFT = "--task sft --model decoder --data chat.jsonl"
CLASSIFY = "--task classify --model encoder --data labels.jsonl"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data chat.jsonl", "--model names no folder: give one with config.json"),
        (f"{SFT} --model nowhere", "--model nowhere is no folder"),
        (f"{SFT} --model empty", "empty has no tokenizer.json"),
        (f"{SFT} --model no-tokenizer", "has no tokenizer.json.*save_pretrained"),
        (f"{SFT} --model broken", r"tokenizer\.json cannot be read"),
        (f"{SFT} --model other", "model_type = 'mamba' is not supported"),
        (f"{SFT} --model encoder", "encoder is an encoder: --task classify"),
        (f"{SFT} --data gone.jsonl", "--data gone.jsonl: there is no such file"),
        (f"{SFT} --data labels.jsonl", "row 1 is neither messages, conversations"),
        (f"{SFT} --data silent.jsonl", "no response to learn from .* without a resp"),
        (f"{SFT} --data long.jsonl --seq-len 64", "response begins behind --seq-len"),
        (f"{SFT} --seq-len 4096", "--seq-len 4096 is too long: the model has 128 pos"),
        (f"{SFT} --optimizer sgdx", "unknown optimizer 'sgdx'"),
        (f"{SFT} --head frozen", "the head of this model is its embedding"),
        (f"{SFT} --select nose", "--select nose names no matrix .* layers/attn/k/kern"),
        (f"{SFT} --embeddings half", "--embeddings must be one of full, projected, fr"),
        (f"{SFT} --export chat.jsonl", "--export chat.jsonl"),
        (f"{CLASSIFY} --data unlabelled.jsonl", "has no labels among its fields: text"),
        (f"{CLASSIFY} --data alike.jsonl", "no labels to tell apart: label is 1"),
        (f"{CLASSIFY} --text-key words", "has no texts among its fields.*--text-key"),
        (f"{CLASSIFY} --pooling last", "--pooling last: encoder is an encoder"),
        (f"{CLASSIFY} --val-data gone", "--val-data gone: there is no such file"),
        (f"{CLASSIFY} --layerwise", "--layerwise updates all parts .*: --task sft"),
        (f"{SFT} --layerwise --adapter lora", "--task sft without --adapter, --grad"),
        (f"{SFT} --layerwise --embeddings frozen", "--gradient and frozen parts"),
        (f"{SFT} --layerwise --weights int8", "--weights int8 turns all of them"),
        (f"{SFT} --activation-budget 9% --layers frozen", "give an --activation-pol"),
        (f"{CLASSIFY} --activation-budget 9%", "by the loss of the next token"),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_mistakes_are_one_line_and_exit_with_2(
    folders, capsys, monkeypatch, flags, message
):
    monkeypatch.chdir(folders)
    assert main([*flags.split(), "--run-dir", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("error: ", line) and re.search(message, line)
    assert not (folders / "run").exists()


def trained(flags: FinetuneConfig, **more) -> tuple[list[float], Trainer]:
    """The losses of a run without evaluations, and its trainer."""
    options = {"eval_every": 0, "checkpoint_every": 0, "answers": 0} | more
    trainer = Trainer(
        dataclasses.replace(flags, **options), jax.devices()[:1], make_task
    )
    try:
        trainer.run(lambda: False)
    finally:
        trainer.close()
    return [x["loss"] for x in trainer.metrics.lines if "loss" in x], trainer


@pytest.mark.whole
def test_few_bits_and_a_budget_of_activations(tmp_path, monkeypatch):
    """What the trainer has for pretraining: near the plain run, and not the same."""
    monkeypatch.chdir(tmp_path)
    chat, labels = conversations(tmp_path), labelled(tmp_path)
    sft = FinetuneConfig(
        task="sft",
        model=write_decoder(tmp_path / "decoder"),
        data=chat,
        optimizer="galore",
        rank=4,
        lr=0.02,
        seq_len=32,
        batch_size=4,
        steps=3,
        embeddings="frozen",
    )
    plain, _ = trained(sft, run_dir="plain")
    for name, more, rtol in (
        ("split", {"weights": "split", "compute_dtype": "float32"}, 0.01),
        ("budget", {"activation_budget": "40%"}, 1e-5),  # planned behind these steps
    ):
        found, trainer = trained(sft, run_dir=name, **more)
        np.testing.assert_allclose(found, plain, rtol=rtol, err_msg=name)
        assert trainer.planner is None or trainer.planner.plan.segments, name
    classify = dataclasses.replace(
        sft,
        task="classify",
        model=write_encoder(tmp_path / "encoder"),
        data=labels,
        batch_size=6,
        seq_len=16,
    )
    whole, _ = trained(classify, run_dir="whole")
    few = {"weights": "int8", "activation_policy": "adacc"}
    compressed, trainer = trained(classify, run_dir="few", **few)
    np.testing.assert_allclose(compressed, whole, rtol=0.05)
    assert compressed != whole
    kernel = trainer.params["layers"]["mlp"]["up"]["kernel"]
    assert {x.dtype.name for x in jax.tree.leaves(kernel)} >= {"uint8"}


@pytest.mark.whole
def test_on_a_mesh_as_on_one_device(tmp_path, monkeypatch):
    """Frozen parameters lie in parts, too."""
    monkeypatch.chdir(tmp_path)
    flags = FinetuneConfig(
        task="sft",
        model=write_decoder(tmp_path / "model"),
        data=conversations(tmp_path),
        optimizer="adamw",
        adapter="lora",
        lora_rank=2,
        lr=0.01,
        seq_len=32,
        batch_size=4,
        steps=3,
    )
    found = []
    for devices, mesh in ((1, ""), (4, "fsdp=2,tensor=2")):
        config = dataclasses.replace(flags, mesh=mesh, run_dir=f"run-{devices}")
        trainer = Trainer(config, jax.devices()[:devices], make_task)
        try:
            trainer.run(lambda: False)
        finally:
            trainer.close()
        found.append([x["loss"] for x in trainer.metrics.lines if "loss" in x])
    # The second has sums over devices in another order.
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_what_the_picture_compares_with(tmp_path):
    """Labels have frequencies; of answers nothing as simple says anything."""
    model, data = write_encoder(tmp_path / "encoder"), labelled(tmp_path)
    task = make_task(FinetuneConfig(task="classify", model=model, data=data))
    rows = [json.loads(line) for line in pathlib.Path(data).read_text().splitlines()]
    yes = np.mean([row["label"] == "yes" for row in rows if row["split"] == "dev"])
    expected = -(yes * np.log(yes) + (1 - yes) * np.log(1 - yes))
    assert task.loss_unit == "nats per row"
    name, value = task.baseline()
    assert "labels" in name and value == pytest.approx(expected)
    model, data = write_decoder(tmp_path / "decoder"), conversations(tmp_path)
    task = make_task(FinetuneConfig(task="sft", model=model, data=data, seq_len=64))
    assert task.loss_unit == "nats per token" and task.baseline() is None
