"""Small models in the style of projects whose models others share: flax's examples, nanodo,
big_vision, vision_transformer, brax, and the Flax classes of HuggingFace and diffusers."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

D = 16


class Vae(nn.Module):
    """As flax's example: mean and log variance are layers of one shape, drawn with a key."""

    latents: int = 8

    def setup(self):
        self.encoder = [nn.Dense(32), nn.Dense(32)]
        self.mean, self.logvar = nn.Dense(self.latents), nn.Dense(self.latents)
        self.decoder = [nn.Dense(32), nn.Dense(32), nn.Dense(64)]

    def encode(self, x):
        for layer in self.encoder:
            x = nn.relu(layer(x))
        return self.mean(x), self.logvar(x)

    def decode(self, z):
        for layer in self.decoder[:-1]:
            z = nn.relu(layer(z))
        return self.decoder[-1](z)

    def __call__(self, x, key):
        mean, logvar = self.encode(x)
        noise = jax.random.normal(key, logvar.shape)
        return self.decode(mean + noise * jnp.exp(0.5 * logvar)), mean, logvar


class Translator(nn.Module):
    """As flax's seq2seq: recurrent cells in `nn.RNN`."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, D)(tokens)
        for i in range(3):
            x = nn.RNN(nn.LSTMCell(D, name=f"cell{i}"))(x)  # pyright: ignore
        return nn.Dense(11)(x)


class Mixer(nn.Module):
    """As vision_transformer's: MLPs over tokens and over channels."""

    @nn.compact
    def __call__(self, x, *, train):
        del train
        x = nn.Conv(D, (2, 2), strides=(2, 2), name="stem")(x)
        x = x.reshape(x.shape[0], -1, D)
        for i in range(3):
            for kind in ("tokens", "channels"):
                y = nn.LayerNorm(name=f"norm_{kind}_{i}")(x)
                y = y.swapaxes(1, 2) if kind == "tokens" else y
                y = nn.Dense(32, name=f"block_{i}_{kind}_in")(y)
                y = nn.Dense(D, name=f"block_{i}_{kind}_out")(nn.gelu(y))
                x = x + (y.swapaxes(1, 2) if kind == "tokens" else y)
        zeros = nn.initializers.zeros
        return nn.Dense(5, kernel_init=zeros, name="head")(x.mean(1))


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(y, y)
        y = nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm(name="norm2")(x)))
        y = nn.Dropout(0.1)(y, deterministic=not train)
        return x + nn.Dense(D, name="down")(y), None


class Encoder(nn.Module):
    """As big_vision's: equal layers by `nn.scan`, their parameters stacked; dropout."""

    depth: int = 4

    @nn.compact
    def __call__(self, x, train=False):
        layers = nn.scan(
            EncoderBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore
            length=self.depth,
        )
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, 4, D))
        x, _ = layers(name="blocks")(x, train)
        return nn.LayerNorm(name="norm")(x).mean(1)


class Decoder(nn.Module):
    """As nanodo's: heads as axes of the kernels, fully sharded, embedding and head tied."""

    @nn.compact
    def __call__(self, tokens):
        sharded = nn.with_partitioning(nn.initializers.normal(0.05), ("data", "model"))
        embed = nn.Embed(11, D, name="embed")
        x, mask = embed(tokens), nn.make_causal_mask(tokens)
        for i in range(4):
            y = nn.RMSNorm(name=f"block_{i}_norm")(x)
            q, k, v = (
                nn.DenseGeneral((4, 4), use_bias=False, name=f"block_{i}_{name}")(y)
                for name in ("query", "key", "value")
            )
            y = nn.dot_product_attention(q, k, v, mask=mask)
            x = x + nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name=f"block_{i}_out")(y)
            y = nn.Dense(32, use_bias=False, kernel_init=sharded, name=f"block_{i}_up")(x)
            x = x + nn.Dense(D, use_bias=False, name=f"block_{i}_down")(nn.gelu(y))
        return embed.attend(x)


class Policy(nn.Module):
    """As brax's: an MLP over several inputs, with two heads."""

    @nn.compact
    def __call__(self, observation, action):
        x = jnp.concatenate([observation, action], -1)
        for i in range(4):
            uniform = nn.initializers.lecun_uniform()
            x = nn.swish(nn.Dense(D, kernel_init=uniform, name=f"hidden_{i}")(x))
        return {"policy": nn.Dense(4, name="policy")(x), "value": nn.Dense(1, name="value")(x)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A configuration object among the attributes of a module."""

    layers: int = 3
    hidden: int = D


class BertLayer(nn.Module):
    config: Settings

    def setup(self):
        normal = nn.initializers.normal(0.02)
        self.attention = nn.MultiHeadDotProductAttention(4, kernel_init=normal)
        self.intermediate = nn.Dense(2 * self.config.hidden, kernel_init=normal)
        self.output = nn.Dense(self.config.hidden, kernel_init=normal)
        self.norm = nn.LayerNorm()

    def __call__(self, x, mask, deterministic):
        x = x + self.attention(x, mask=mask, deterministic=deterministic)
        return self.norm(x + self.output(nn.gelu(self.intermediate(x))))


class BertLayers(nn.Module):
    config: Settings

    def setup(self):
        self.layer = [BertLayer(self.config, name=str(i)) for i in range(self.config.layers)]

    def __call__(self, x, mask, deterministic):
        states = [x]
        for layer in self.layer:
            states.append(layer(states[-1], mask, deterministic))
        return tuple(states)


class Bert(nn.Module):
    """As HuggingFace's: modules in `setup`, named by numbers; a mask; a tuple of outputs."""

    config: Settings = Settings()

    def setup(self):
        normal = nn.initializers.normal(0.02)
        self.embeddings = nn.Embed(11, self.config.hidden, embedding_init=normal)
        self.encoder = BertLayers(self.config)
        self.pooler = nn.Dense(self.config.hidden)

    def __call__(self, ids, mask, deterministic=True):
        pairs = nn.make_attention_mask(mask, mask)
        states = self.encoder(self.embeddings(ids), pairs, deterministic)
        return states[-1], nn.tanh(self.pooler(states[-1][:, 0])), states


class UNet(nn.Module):
    """As diffusers': convolutions, group norms, an embedding of time, transposed convolutions."""

    @nn.compact
    def __call__(self, sample, timesteps, train=False):
        del train
        angles = timesteps[:, None] * 2.0 ** jnp.arange(D // 2, dtype=jnp.float32)[None]
        time = nn.Dense(D, name="time")(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1))
        x = nn.Conv(D, (3, 3), name="conv_in")(sample)

        def resnet(x, name):
            y = nn.Conv(D, (3, 3), name=f"{name}_conv1")(nn.swish(nn.GroupNorm(4)(x)))
            y = y + nn.Dense(D, name=f"{name}_time")(nn.swish(time))[:, None, None]
            return x + nn.Conv(D, (3, 3), name=f"{name}_conv2")(nn.swish(nn.GroupNorm(4)(y)))

        skips = [x]
        for i in range(2):
            x = nn.Conv(D, (3, 3), strides=(2, 2), name=f"down_{i}")(resnet(x, f"down_{i}_resnet"))
            skips.append(x)
        for i in range(2):
            x = resnet(x + skips.pop(), f"up_{i}_resnet")
            x = nn.ConvTranspose(D, (3, 3), strides=(2, 2), name=f"up_{i}")(x)
        return nn.Conv(1, (3, 3), kernel_init=nn.initializers.zeros, name="conv_out")(x)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its inputs and options, and the weights to share."""

    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    include: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stack_axis: int | None = None

    def __str__(self) -> str:
        return self.name


TOKENS = jnp.arange(10).reshape(2, 5)
PIXELS = jnp.sin(jnp.arange(2 * 8 * 8, dtype=jnp.float32)).reshape(2, 8, 8, 1)
ROWS = jnp.sin(jnp.arange(2 * 64, dtype=jnp.float32)).reshape(2, 64)
CASES = {
    "vae": Case("vae", Vae(), (ROWS, jax.random.key(1)), r"(mean|logvar)/kernel"),
    "seq2seq": Case("seq2seq", Translator(), (TOKENS,), r"cell\d/(?P<k>h[ifgo])/kernel"),
    "mixer": Case("mixer", Mixer(), (PIXELS,), r"block_\d_(?P<k>\w+)/kernel", {"train": False}),
    "encoder": Case(
        "encoder",
        Encoder(),
        (ROWS.reshape(2, 4, D),),
        r"blocks/(attention/)?(?P<k>\w+)/kernel",
        {"train": False},
        stack_axis=0,
    ),
    "decoder": Case("decoder", Decoder(), (TOKENS,), r"block_\d_(?P<k>\w+)/kernel"),
    "policy": Case("policy", Policy(), (ROWS[:, :12], ROWS[:, :4]), r"hidden_\d/kernel"),
    "bert": Case(
        "bert", Bert(), (TOKENS, jnp.ones((2, 5))), r"encoder/\d/(attention/)?(?P<k>\w+)/kernel"
    ),
    "unet": Case(
        "unet", UNet(), (PIXELS, jnp.arange(2.0)), r"\w+_resnet_(?P<k>conv\d|time)/kernel"
    ),
}
