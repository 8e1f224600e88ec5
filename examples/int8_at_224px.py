"""What INT8 is worth at 224 px, where the arithmetic outweighs the overhead: speed and placement, no accuracy.

    python examples/int8_at_224px.py --data data/fashion-mnist/train --out bench/int8-at-224px

Each backbone is pretrained for one step (its weights are as good as random, which is enough for speed and says nothing
about accuracy), exported in FP32 and INT8, measured by the quick protocol, and compared. The measured result of two
cores of a Xeon with AVX512-VNNI lies beside this file, in int8_at_224px.json. It took 3.5 minutes there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from midge.export.config import ExportConfig
from midge.export.export import export_run
from midge.profiles.compare import compare
from midge.profiles.compare_config import CompareConfig
from midge.profiles.config import ProfileConfig
from midge.profiles.profile import profile
from midge.train.pretrain import pretrain
from midge.train.recipes import dino_cnn


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of images")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "mobilenetv2_100"], help="names of timm")
    parser.add_argument("--image-px", type=int, default=224, help="side of the input, px")
    parser.add_argument("--calibration-images", type=int, default=64)
    parser.add_argument("--protocol", default="quick", help="smoke, quick, standard or rigorous")
    given = parser.parse_args()
    artifacts = []
    for backbone in given.backbones:
        run, artifact = given.out / f"run-{backbone}", given.out / backbone
        size = {"image_px": given.image_px, "batch_size": 8, "limit": 8, "epochs": 1.0, "workers": 0}
        small = {"head_hidden": 64, "head_outputs": 64, "warmup_epochs": 0.0}
        pretrain(dino_cnn(given.data, run, backbone=backbone, **size, **small))
        export_run(ExportConfig(run, out=artifact, data=given.data, calibration_images=given.calibration_images))
        artifacts.append(artifact)
    records = given.out / "records"
    profile(ProfileConfig(tuple(artifacts), out=records, protocol=given.protocol))
    compare(CompareConfig(records, summary=given.out / "summary.json", html=given.out / "report.html"))


if __name__ == "__main__":
    main()
