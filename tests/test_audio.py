"""Sounds in every format become the same waveform, and an encoder's features depend on the sound alone."""

import io
import json
import shutil

import av
import numpy as np
import pytest
import torch
from transformers import audio_utils

from twofold.data import cache
from twofold.data.audio import hear
from twofold.data.cache import decoded_sounds
from twofold.data.sources import Column, Source
from twofold.errors import BundleError, DecodeError, UsageError
from twofold.models import sounds as sounds_of
from twofold.models.bundle import Bundle
from twofold.models.encoders import encoder, fingerprint, inference
from twofold.models.sounds import LogMel, SoundTransformer, frames, mel_encoder, mel_filters


def tone(hertz: float = 440, *, seconds: float = 1.0, rate: int = 16_000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seed: int, seconds: float) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


def stored(wave: np.ndarray, kind: str = "wav", codec: str = "pcm_s16le", rate: int = 16_000) -> bytes:
    """A sound file of one channel, or of the rows of `wave`, written by FFmpeg."""
    channels = np.atleast_2d(wave)
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono" if len(channels) == 1 else "stereo")
        frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=stream.layout.name)
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, stream.layout, rate, frame_size=stream.codec_context.frame_size)
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(part))
    return out.getvalue()


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_sixteen_bits_at_the_same_rate_come_back_to_half_a_step():
    wave = noise(0, 0.5)
    np.testing.assert_allclose(hear(stored(wave)), wave, atol=0.51 / 2**15)
    assert np.array_equal(hear(stored(wave, codec="pcm_f32le")), wave)


@pytest.mark.parametrize(("kind", "codec"), [("flac", "flac"), ("ogg", "libopus"), ("mp3", "libmp3lame")])
def test_every_format_is_the_same_sound(kind, codec):
    heard = hear(stored(tone(), kind, codec))
    spectrum = np.abs(np.fft.rfft(heard))
    assert abs(len(heard) - 16_000) < 2400, "an encoder may add a little silence"
    assert abs(spectrum.argmax() * 16_000 / len(heard) - 440) < 2
    assert abs(np.abs(heard[4000:12000]).max() - 0.3) < 0.03


def test_another_rate_is_resampled_and_what_the_new_one_cannot_hold_is_gone():
    for rate in (8_000, 44_100, 48_000):
        heard = hear(stored(tone(rate=rate), rate=rate))
        assert abs(len(heard) - 16_000) <= 16
        np.testing.assert_allclose(heard[1000:15000], tone()[1000:15000], atol=2e-3)
    above = hear(stored(tone(12_000, rate=48_000), rate=48_000))  # would come back as 4 kHz
    assert np.abs(above[1000:-1000]).max() < 1e-2


def test_channels_are_averaged():
    left, right = tone(300), tone(700)
    np.testing.assert_allclose(hear(stored(np.stack([left, right]))), (left + right) / 2, atol=1e-4)


def test_only_the_first_seconds_are_heard(tmp_path):
    (tmp_path / "long.wav").write_bytes(stored(noise(0, 3)))
    heard = hear(tmp_path / "long.wav", seconds=1.5)
    assert len(heard) == 24_000 and np.array_equal(heard, hear(tmp_path / "long.wav")[:24_000])
    assert len(hear(noise(0, 3), seconds=1.5)) == 24_000


@pytest.mark.parametrize(
    ("sound", "told"),
    [
        (b"", "empty"),
        (b"RIFF and no more", "not a sound that can be decoded"),
        (stored(tone())[:30], "not a sound that can be decoded"),
        (stored(np.zeros(1, np.float32)), "one sample; a sound lasts 25 ms at least"),
        (np.zeros(399, np.float32), "399 samples"),
        (np.zeros(0, np.float32), "empty"),
        (np.zeros((2, 16_000), np.float32), r"\[2, 16000\] of float32; a waveform is \[samples\]"),
        (np.full(16_000, np.nan, np.float32), "not finite"),
    ],
)
def test_what_is_no_sound_is_told_by_name(sound, told):
    with pytest.raises(DecodeError, match=f"^clip7: .*{told}"):
        hear(sound, name="clip7")


def test_a_picture_or_a_file_that_is_not_there_is_told(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for name, told in (("nothing.ogg", "no such file"), ("picture.png", "no sound"), ("", "a folder, not a sound")):
        with pytest.raises(DecodeError, match=told):
            hear(tmp_path / name)


def test_the_sounds_of_a_source_are_heard_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TWOFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.wav").write_bytes(stored(noise(0, 0.5)))
    source = Source("sounds", ["a", "b", "c"], columns={"speech": Column("audio", [tmp_path / "a.wav", b"", tone()])})
    waves, kept, skipped = decoded_sounds(source, "speech", 16_000, 0.4)
    assert kept.tolist() == [0, 2] and skipped == [("b", "empty")]
    for wave, sound in zip(waves, (tmp_path / "a.wav", tone()), strict=True):
        assert np.array_equal(wave, hear(sound, seconds=0.4))
    monkeypatch.setattr(cache, "hear", None)
    again = decoded_sounds(source, "speech", 16_000, 0.4)
    assert again.skipped == skipped and all(map(np.array_equal, again.waves, waves))


# --- log-mel spectrograms ---------------------------------------------------------------------------------------------


def test_the_filters_are_those_of_the_htk_scale():
    reference = audio_utils.mel_filter_bank(201, 80, 0, 8000, 16_000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_filters().numpy(), reference.T, atol=1e-5)


def test_the_spectrogram_is_that_of_a_plain_implementation():
    wave = noise(0, 0.4) + tone(seconds=0.4)
    power = audio_utils.spectrogram(wave, np.hanning(401)[:-1], 400, 160, power=2.0, center=False)
    bands = np.log10(np.maximum(mel_filters().numpy() @ power, 1e-10))
    bands = np.maximum(bands, bands.max() - 8)
    expected = (bands - bands.mean()) / bands.std()
    given = LogMel()(torch.from_numpy(wave)[None], torch.tensor([len(wave)]))[0]
    np.testing.assert_allclose(given.numpy(), expected, atol=2e-3)


def test_loudness_is_gone_and_silence_is_zero():
    wave = torch.from_numpy(noise(0, 0.5))
    quiet, loud, silent = LogMel()(torch.stack([wave, 5 * wave, 0 * wave]), torch.tensor([8000] * 3))
    torch.testing.assert_close(quiet, loud, atol=1e-3, rtol=0)
    assert silent.abs().max() == 0


def test_the_shortest_sound_has_one_frame():
    assert frames(torch.tensor([400, 559, 560, 16_000])).tolist() == [1, 1, 2, 98]


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mel:tiny", "mel:timm:resnet18/8"])
def test_a_sound_has_the_same_features_whatever_it_is_embedded_with(name, monkeypatch):
    torch.manual_seed(0)
    hears = mel_encoder(name, seconds=2).eval()
    monkeypatch.setattr(sounds_of, "ALIKE", 2)  # those of like length go through together
    sounds = [noise(1, 0.3), noise(2, 2), noise(3, 0.025), noise(4, 0.2), noise(5, 1)]
    with inference(hears):
        together = hears(hears.inputs(sounds))
        alone = torch.cat([hears(hears.inputs([sound])) for sound in sounds])
    assert together.shape == (5, hears.dim)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_loss_reaches_every_weight():
    network = SoundTransformer(128, 2)
    network(torch.randn(2, 80, 50), torch.tensor([50, 20])).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in network.named_parameters() if "k_" not in name
    )


def test_an_unknown_sound_encoder_is_told_with_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'mel:small'"):
        encoder("mel:smal")
    with pytest.raises(UsageError, match="Did you mean 'timm:resnet18'"):
        encoder("mel:timm:resnet81")
    with pytest.raises(UsageError, match="cannot see a spectrogram"):
        encoder("mel:timm:vit_tiny_patch16_224")


# --- models of transformers -------------------------------------------------------------------------------------------


def whisper(folder):
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "max_source_positions": 100}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    WhisperModel(WhisperConfig(**small, **heads, **ends)).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)


def wav2vec2(folder, *, masks: bool):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    stem = {"conv_dim": [8, 8], "conv_stride": [16, 8], "conv_kernel": [32, 16], "num_feat_extract_layers": 2}
    about = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    norm = {"feat_extract_norm": "layer" if masks else "group", "do_stable_layer_norm": masks}
    Wav2Vec2Model(Wav2Vec2Config(**small, **stem, **about, **norm)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=masks).save_pretrained(folder)


def ast(folder):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ASTModel(ASTConfig(**small, max_length=200, num_mel_bins=32)).save_pretrained(folder)
    ASTFeatureExtractor(max_length=200, num_mel_bins=32).save_pretrained(folder)


def clap(folder):
    from transformers import ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig

    sizes = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "num_attention_heads": [1, 1]}
    hears = ClapAudioConfig(**sizes, num_hidden_layers=2, projection_dim=12)
    reads = ClapTextConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=12)
    config = ClapConfig(text_config=reads.to_dict(), audio_config=hears.to_dict(), projection_dim=12)
    ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(max_length_s=2, truncation="rand_trunc").save_pretrained(folder)


FAMILIES = {
    "whisper": whisper,
    "wav2vec2": lambda folder: wav2vec2(folder, masks=True),
    "wav2vec2-group": lambda folder: wav2vec2(folder, masks=False),
    "ast": ast,
    "clap": clap,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, write in FAMILIES.items():
        torch.manual_seed(0)
        write(root / name)
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_hear_and_come_back_from_a_bundle(folders, family, tmp_path):
    shutil.copytree(folders / family, tmp_path / family)
    hears = encoder(f"hf:{tmp_path / family}")
    assert hears.kind == "audio" and hears.spec["name"] == f"hf:{family}"
    sounds = [noise(1, 0.3), noise(2, 1.7), tone(seconds=20)]
    with inference(hears):
        together = hears(hears.inputs(sounds))
        alone = torch.cat([hears(hears.inputs([sound])) for sound in sounds])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    bundle = Bundle({"speech": hears})
    bundle.save(tmp_path / "bundle")
    shutil.rmtree(tmp_path / family)
    again = Bundle.load(tmp_path / "bundle", device="cpu")
    assert again.fingerprint == bundle.fingerprint
    assert np.array_equal(again.encode(sounds, modality="speech"), bundle.encode(sounds, modality="speech"))


def test_whisper_is_averaged_over_the_clip_and_not_over_its_padding(folders):
    from transformers import WhisperFeatureExtractor, WhisperModel

    model = WhisperModel.from_pretrained(folders / "whisper").get_encoder().eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folders / "whisper")
    wave = noise(1, 0.5)  # a quarter of 2 s, and of the encoder's 100 states
    with torch.no_grad():
        expected = model(extractor(wave, sampling_rate=16_000, return_tensors="pt").input_features).last_hidden_state
        hears = encoder(f"hf:{folders / 'whisper'}")
        torch.testing.assert_close(hears(hears.inputs([wave])), expected[:, :25].mean(1))


def test_clap_ends_in_its_own_projection(folders):
    from transformers import ClapFeatureExtractor, ClapModel

    model = ClapModel.from_pretrained(folders / "clap").eval()
    wave = np.tile(tone(seconds=0.5, rate=48_000), 2)
    given = ClapFeatureExtractor.from_pretrained(folders / "clap")(wave, sampling_rate=48_000, return_tensors="pt")
    hears = encoder(f"hf:{folders / 'clap'}", "audio")
    with inference(hears):
        z = hears(hears.inputs([wave]))
        expected = model.get_audio_features(**given).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(z), expected)
    assert hears.rate == 48_000 and hears.dim == 12


def test_a_text_model_is_no_sound_encoder_and_says_so(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 16}))
    with pytest.raises(BundleError, match="not a readable transformers audio model"):
        encoder(f"hf:{tmp_path}", "audio")


def test_an_edited_feature_extractor_is_noticed(folders, tmp_path):
    hears = encoder(f"hf:{folders / 'whisper'}")
    Bundle({"audio": hears}).save(tmp_path / "bundle")
    path = tmp_path / "bundle" / "audio" / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"hop_length": 160', '"hop_length": 120'))
    with pytest.raises(BundleError):
        Bundle.load(tmp_path / "bundle")
    assert fingerprint(hears) == fingerprint(encoder(f"hf:{folders / 'whisper'}"))
