"""Downloads through torchvision's data set classes: its addresses, its checksums, our care for half-made
folders.
"""

import shutil
import socket
from pathlib import Path

from data_loader import DataError

TIMEOUT_S = 30.0  # without an answer; torchvision itself would wait for ever


def with_torchvision(class_name: str, final: Path, name: str, reason: str | None) -> None:
    """Download a torchvision data set so that `final` (torchvision's own sub-folder of its root) is whole.

    Everything happens under a temporary root beside it; only a folder that torchvision has checked is
    renamed. reason: why what is there now does not do. Raises DataError if the download fails.
    """
    import torchvision.datasets  # it brings torch with it: seconds, needed for downloads only

    root = final.parent / f"{final.name}.partial"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    old_timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        for train in (True, False):
            getattr(torchvision.datasets, class_name)(root=root, train=train, download=True)
        shutil.rmtree(final, ignore_errors=True)
        (root / final.name).rename(final)
    except Exception as error:  # URLError, RuntimeError, TimeoutError, EOFError of a damaged archive...
        raise DataError(
            f"cannot download {name} ({error}); what is needed is not in {final} ({reason}): connect to the"
            " network, or put the unpacked files there"
        ) from None
    finally:
        socket.setdefaulttimeout(old_timeout_s)
        shutil.rmtree(root, ignore_errors=True)
