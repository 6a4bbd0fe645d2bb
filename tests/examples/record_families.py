"""Writes what transformers computes for the models of `families.py`.

    python -m tests.examples.record_families

needs torch and transformers, and is run again when a family is added; the tests read
`tests/examples/golden/families.npz` alone.
"""

import json
import pathlib
import tempfile

import numpy as np
import torch
import transformers

from tests.examples.families import (
    ENCODERS,
    FAMILIES,
    MASK,
    TOKENS,
    TYPES,
    draw,
    fields,
)

OUT = pathlib.Path(__file__).parent / "golden" / "families.npz"


def record(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Configuration, tensor names and shapes; and results."""
    family, _ = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**fields(name))
    config._attn_implementation = "eager"
    head = "ForMaskedLM" if name in ENCODERS else "ForCausalLM"
    model = getattr(transformers, f"{family}{head}")(config).eval()
    state = {
        key: torch.from_numpy(draw(key, tuple(value.shape), family == "Gemma"))
        for key, value in model.state_dict().items()
        if "position_ids" not in key
    }
    # A tied tensor has two names here, and one in a file.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        text = (pathlib.Path(folder) / "config.json").read_text()
        from safetensors import safe_open

        with safe_open(f"{folder}/model.safetensors", "np") as file:
            names = {k: list(file.get_slice(k).get_shape()) for k in file.keys()}
    state = {key: value for key, value in state.items() if key in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    model.tie_weights()
    tokens = torch.from_numpy(TOKENS).long()
    with torch.no_grad():
        if name in ENCODERS:
            types = torch.from_numpy(TYPES).long() * (config.type_vocab_size > 1)
            mask = torch.from_numpy(MASK).long()
            tokens = torch.where(mask > 0, tokens, config.pad_token_id)
            out = model(tokens, mask, token_type_ids=types, output_hidden_states=True)
        else:
            out = model(tokens, output_hidden_states=True)
    results = {
        "logits": out.logits.numpy()[:, ::2],
        "hidden": out.hidden_states[-1].numpy()[:, ::2],
    }
    about = json.loads(text)
    about.pop("transformers_version", None)
    return {"config": about, "tensors": names, "unset": sorted(missing)}, results


def main() -> None:
    about, arrays = {}, {}
    for name in FAMILIES:
        about[name], results = record(name)
        arrays |= {f"{name}/{key}": value for key, value in results.items()}
        print(name, len(about[name]["tensors"]), np.abs(results["logits"]).max())
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    about = json.dumps({"versions": versions, "models": about})
    np.savez_compressed(OUT, about=np.array(about), **arrays)
    print(OUT, OUT.stat().st_size)


if __name__ == "__main__":
    main()
