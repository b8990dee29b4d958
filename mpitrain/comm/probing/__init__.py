"""Whether an MPI library really takes memory of devices: tried in jobs of their own, and what came of it kept."""

from mpitrain.comm.probing.verdict import Known, Setting, Verdict, known, save, setting

__all__ = ["Known", "Setting", "Verdict", "known", "save", "setting"]
