"""What the collectives ask of a device: a queue of work on it, one class for each kind of device."""

from mpitrain.arrays.devices.stream import Beacon, Event, Stream

__all__ = ["Beacon", "Event", "Stream"]
