"""The networks against NumPy, their sizes, and their initialisation."""

import numpy as np
import oracle
import pytest
import tensorflow as tf
from conftest import phantom_slices, small_config

from tf_lesion.baselines import make_model
from tf_lesion.caches.slices import is_legal_size
from tf_lesion.config import NetworkConfig
from tf_lesion.files import InputError
from tf_lesion.networks import Decoder, Encoder, PriorNetwork, latent_size, upsample_and_pad
from tf_lesion.noise import slice_noise
from tf_lesion.presets import preset


def _randomized(model, seed=0):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.3, weight.shape))
    return model


def test_networks_equal_the_numpy_oracle():
    model = _randomized(make_model(small_config(network={"num_clusters": 3, "dim_z": 2})))
    image = phantom_slices(1)[..., None]
    noise = slice_noise(model.noise_shapes, seed=1, step=0, slices=[0], stream="test")
    outputs = model(image, noise)
    expected = oracle.encoder(model.encoder, image[0])
    expected |= oracle.decoder(model.decoder, outputs["z"].numpy()[0])
    expected |= oracle.prior_network(model.prior_network, outputs["omega"].numpy()[0])
    for name, values in expected.items():
        np.testing.assert_allclose(outputs[name][0], values, rtol=1e-4, atol=1e-4, err_msg=name)
        assert np.ptp(values) > 1e-3, f"{name} is constant: the comparison says nothing"


def test_released_sizes_and_weight_counts_are_those_of_table_3():
    gmvae, vae = make_model(preset("released")), make_model(preset("released", "vae"))
    assert gmvae.count_params() == 372_370
    assert vae.count_params() == 371_332
    assert gmvae.grid == (32, 42)
    noise = {name: tf.zeros([2, *shape]) for name, shape in gmvae.noise_shapes.items()}
    outputs = gmvae(tf.zeros([2, 158, 198, 1]), noise)
    shapes = {name: tuple(value.shape[1:]) for name, value in outputs.items()}
    assert shapes["z_mean"] == shapes["omega_logvar"] == (32, 42, 1)
    assert shapes["prior_mean"] == shapes["prior_log_precision"] == (32, 42, 1, 6)
    assert shapes["y_mean"] == shapes["y_log_precision"] == (158, 198, 1)
    assert shapes["cluster_probs"] == (32, 42, 6)


def test_intermediate_heights_of_the_decoder_are_the_released_ones():
    decoder = Decoder(NetworkConfig(num_filters=2))
    features = decoder.features(tf.zeros([1, 32, 42, 1]))
    assert features.shape == (1, 78, 98, 2)
    assert upsample_and_pad(features).shape == (1, 160, 200, 2)


@pytest.mark.parametrize("pixels", range(30, 62))
def test_a_size_is_legal_exactly_if_the_networks_give_it_back(pixels):
    network = NetworkConfig(num_filters=1)
    encoder, decoder = Encoder(network), Decoder(network)
    try:
        latent = encoder(tf.zeros([1, pixels, 34, 1]))["z_mean"]
        returned = decoder(latent)["y_mean"].shape[1] if latent.shape[1] else None
    except ValueError:
        returned = None
    assert is_legal_size(pixels) == (returned == pixels)
    if is_legal_size(pixels):
        assert latent.shape[1] == latent_size(pixels)


def test_an_illegal_size_is_refused_with_the_legal_ones():
    with pytest.raises(InputError, match=r"30 \+ 4k pixels.*got 160 x 198"):
        make_model(preset("released").replace(network={"height": 160}))


def test_released_initialisation_has_its_spread_and_biases():
    model = make_model(preset("released"))
    kernels = [np.ravel(w) for w in model.weights if w.path.endswith("kernel")]
    values = np.concatenate(kernels)
    assert np.abs(values).max() <= 0.02 + 1e-6  # truncated at two standard deviations
    assert values.std() == pytest.approx(0.01 * 0.8796, rel=0.01)  # of a normal cut at 2 sigma
    biases = {w.path: np.unique(w) for w in model.weights if w.path.endswith("bias")}
    for path, value in biases.items():
        expected = 0.1 if "log_precision" in path else 0.01
        assert value == pytest.approx([expected]), path


@pytest.mark.parametrize("clusters", [0, -1])
def test_a_prior_network_needs_a_cluster(clusters):
    with pytest.raises(ValueError, match=f"1 or more, got {clusters}"):
        PriorNetwork(NetworkConfig(num_clusters=clusters))


def test_bfloat16_convolutions_give_float32_outputs_close_to_float32():
    exact = _randomized(make_model(small_config()))
    rough = make_model(small_config(network={"precision": "bfloat16"}))
    rough.set_weights(exact.get_weights())
    image = phantom_slices(2)[..., None]
    noise = slice_noise(exact.noise_shapes, seed=1, step=0, slices=[0, 1], stream="test")
    ours, theirs = exact(image, noise), rough(image, noise)
    assert all(value.dtype == tf.float32 for value in theirs.values())
    assert all(weight.dtype == "float32" for weight in rough.weights)
    difference = np.abs(ours["y_mean"] - theirs["y_mean"]).max() / np.abs(ours["y_mean"]).max()
    assert 0 < difference < 0.05


def test_flipping_latent_and_kernels_flips_the_decoded_image():
    """Padding and upsampling are centered: nothing but the kernels knows left from right."""
    decoder = _randomized(make_model(small_config("vae"))).decoder
    z = np.random.default_rng(3).normal(size=(1, 2, 3, 1)).astype(np.float32)
    straight = decoder(z)["y_mean"].numpy()
    spatial = [*decoder.low, decoder.middle, *decoder.high, decoder.mean_head]
    for layer in spatial:
        layer.kernel.assign(layer.kernel.numpy()[::-1, ::-1])
    flipped = decoder(z[:, ::-1, ::-1])["y_mean"].numpy()
    np.testing.assert_allclose(flipped[:, ::-1, ::-1], straight, rtol=1e-4, atol=1e-4)
    assert np.abs(straight - straight[:, ::-1, ::-1]).max() > 1e-2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_fast_decoder_equals_its_definition(precision):
    z = tf.constant(np.random.default_rng(3).normal(size=(2, 2, 3, 1)), tf.float32)
    outputs, gradients = [], []
    for fast in (True, False):
        network = {"precision": precision if fast else "float32"}
        decoder = _randomized(make_model(small_config("vae", network=network))).decoder
        decoder.fast = fast
        with tf.GradientTape() as tape:
            tape.watch(z)
            output = decoder(z)
            loss = tf.reduce_sum(output["y_mean"] ** 2 + output["y_log_precision"])
        layers = [*decoder.low, decoder.middle, *decoder.high, decoder.mean_head]
        weights = [z, *(weight.value for layer in layers for weight in layer.trainable_weights)]
        outputs += [output]
        gradients += [tape.gradient(loss, weights)]
    tolerance = 1e-5 if precision == "float32" else 0.02
    for name, values in outputs[1].items():
        scale = np.abs(values).max()
        np.testing.assert_allclose(outputs[0][name], values, atol=tolerance * scale)
    # Processors without bfloat16 sum the gradient of a kernel in it: off by up to 0.085 there. A
    # tap or a phase that is missing is off by more.
    tolerance = 1e-5 if precision == "float32" else 0.12
    for ours, definition in zip(*gradients, strict=True):
        scale = np.abs(definition).max()
        assert scale > 0
        np.testing.assert_allclose(ours, definition, atol=tolerance * scale)


def test_biases_learn_in_bfloat16():
    """Keras's own layer is off by 0.2 here, more on larger maps."""
    image = tf.constant(np.random.default_rng(4).random((4, 90, 90, 1)), tf.float32)
    gradients = {}
    for precision in ("float32", "bfloat16"):
        config = small_config("vae", network={"precision": precision})
        encoder = _randomized(make_model(config)).encoder
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.nn.softplus(encoder(image)["z_mean"]))
        layers = [*encoder.trunk, encoder.heads["z_mean"]]
        gradients[precision] = tape.gradient(loss, [layer.bias.value for layer in layers])
    for exact, found in zip(*gradients.values(), strict=True):
        np.testing.assert_allclose(found, exact, atol=0.03 * np.abs(exact).max())
