"""Reads what calibration has measured on this machine; see `load_calibration`."""

from foveal.core.log import warn_once
from foveal.hardware import store
from foveal.hardware.profile import Machine
from foveal.hardware.roofline import Peaks

FORMAT = 1
REMEDY = "`foveal doctor --calibrate` makes a new one"


def load_calibration(machine: Machine, device: str = "cpu") -> Peaks | None:
    """The peaks measured on this machine; None if it has not been calibrated."""
    name = store.file_name(f"calibration-{device}", machine)
    content = store.load(name, FORMAT, REMEDY)
    if content is None:
        return None
    try:
        fields = content["peaks"]
        fields["matmul_flops"] = tuple(fields["matmul_flops"].items())
        return Peaks(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        warn_once(f"{name} is not a calibration and is ignored ({error!r}); {REMEDY}")
        return None
