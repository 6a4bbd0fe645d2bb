"""Keras 3 on JAX: `fit` with an adapter from Optax, saved as a `.keras` file.

Three lines to change, once `Optax` below is copied:

    import lowrank_optax as lro
    optimizer = Optax("galore", {"rank": 4})   # was keras.optimizers.AdamW(1e-2)
    model.compile(optimizer=optimizer, loss=loss)

The adapter keeps every array of the state as a variable of Keras, so that saving,
loading and `fit` see it, and it is made of a method's name and options, because a
`.keras` file holds what it takes to make the optimizer again. Keras' learning rate,
its schedules, callbacks and `clipnorm` work as ever: it multiplies the method's
direction (`lro.scale_by_galore`). Weight decay is Keras', too.

Meshes are Keras' (`keras.distribution`); the adapter lays its variables out by the
model's. Give layers names, since random starts are drawn by a parameter's path and
Keras numbers the layers that have none.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python -m examples.clients.keras_jax
"""

import contextlib
import itertools
import os
import pathlib
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported

import jax
import keras  # pyright: ignore[reportMissingImports]
import optax

import lowrank_optax as lro
from examples.clients import common

PROJECTED = ("down/kernel", "up/kernel")


@keras.saving.register_keras_serializable(package="lowrank_optax")
class Optax(keras.optimizers.Optimizer):
    """A method of this library, by its name, as an optimizer of Keras."""

    def __init__(
        self, method: str, options: Any = (), learning_rate: Any = 1e-2, **kwargs: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.method, self.options = method, dict(options)
        direction = getattr(lro, f"scale_by_{method}")(**self.options)
        self.tx: optax.GradientTransformation = direction

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        # Random starts are drawn by path, and a loaded model has lost its own name.
        paths = [variable.path.split("/") for variable in variables]
        alike = itertools.takewhile(
            lambda x: len(set(x)) == 1, zip(*paths, strict=False)
        )
        shared = len(list(alike))
        self.paths = ["/".join(path[shared:]) for path in paths]

        params = self.tree(variable.value for variable in variables)
        leaves, self.structure = jax.tree.flatten(self.tx.init(params))
        layouts = [None] * len(leaves)
        if keras.distribution.distribution() is not None:
            shardings = jax.tree.map(lambda x: x.sharding, params)
            layouts = jax.tree.leaves(lro.state_shardings(self.tx, params, shardings))
        self.kept = [
            self.add_variable(leaf.shape, dtype=str(leaf.dtype), layout=layout)
            for leaf, layout in zip(leaves, layouts, strict=True)
        ]
        for variable, leaf in zip(self.kept, leaves, strict=True):
            variable.assign(leaf)

    def tree(self, values: Any) -> dict[str, Any]:
        return dict(zip(self.paths, values, strict=True))

    def _backend_update_step(self, grads: Any, variables: Any, rate: Any) -> None:
        params = self.tree(variable.value for variable in variables)
        state = self.structure.unflatten(variable.value for variable in self.kept)
        updates, state = self.tx.update(self.tree(grads), state, params)
        for variable, kept in zip(self.kept, jax.tree.leaves(state), strict=True):
            variable.assign(kept)
        params = optax.tree.add_scale(params, -rate, updates)
        for variable, path in zip(variables, self.paths, strict=True):
            variable.assign(params[path])

    def get_config(self) -> dict[str, Any]:
        own = {"method": self.method, "options": self.options}
        return super().get_config() | own


def make_model(method: str) -> keras.Model:
    layers = [
        keras.Input((), dtype="int32"),
        keras.layers.Embedding(common.VOCABULARY, common.WIDTH, name="embed"),
        keras.layers.Dense(common.HIDDEN, activation="relu", name="up"),
        keras.layers.Dense(common.WIDTH, name="down"),
        keras.layers.Dense(common.VOCABULARY, name="head"),
    ]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=Optax(method, common.METHODS[method]), loss=loss)
    return model


def on_four_devices() -> Any:
    """Batches and the two middle matrices are cut, by Keras' own means."""
    names = keras.distribution.list_devices()[:4]
    mesh = keras.distribution.DeviceMesh((2, 2), ("data", "model"), names)
    cut = keras.distribution.LayoutMap(mesh)
    cut[".*up/kernel"], cut[".*down/kernel"] = (None, "model"), ("model", None)
    return keras.distribution.ModelParallel(layout_map=cut, batch_dim_name="data")


def train(
    method: str, folder: pathlib.Path, steps: int, sharded: bool = False
) -> common.Run:
    """Trains to step `steps`, from the file in `folder` if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.keras"
    keras.utils.set_random_seed(0)
    with on_four_devices().scope() if sharded else contextlib.nullcontext():
        model = keras.models.load_model(path) if path.exists() else make_model(method)
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        report = lro.selection_report(optimizer.tx, params_of(model))

        losses = []
        for step in range(int(optimizer.iterations), steps):
            # One batch is all that `fit` sees: the loss is that of a step.
            tokens, after = common.batch(step)
            past = model.fit(tokens, after, len(tokens), verbose=0, shuffle=False)
            losses += past.history["loss"]
        model.save(path)
    kept = [variable.value for variable in optimizer.kept]
    state = optimizer.structure.unflatten(kept)
    return common.Run(report, losses, (params_of(model), state))


def params_of(model: Any) -> dict[str, Any]:
    return model.optimizer.tree(x.value for x in model.trainable_variables)


if __name__ == "__main__":
    common.main(train, [{"sharded": False}, {"sharded": True}])
