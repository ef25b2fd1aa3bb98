"""All checks, in the order in which they are made: what the others stand on comes first."""

from launch.checkup import images, machine, ranks, runs, steps
from launch.checkup.check import Check

CHECKS = (
    Check("versions", machine.versions),
    Check("GPU and driver", machine.gpu),
    Check("exchange between ranks", machine.exchange),
    Check("cores and affinity", machine.affinity),
    Check("fp32 and TF32", machine.fp32),
    Check("decoders: DALI and Pillow", images.decoders),
    Check("decoders: GPU and CPU", images.gpu_decoder),
    Check("loaders: DALI and torchvision", images.loaders_agree),
    Check("images that grow", images.growing_sizes),
    Check("loader from a checkpoint", images.rebuilt),
    Check("hand-over to torch", images.handed_over),
    Check("decoding rates", images.decoding_rates),
    Check("host reads of a step", steps.reads_of_a_step),
    Check("step rates", steps.rates),
    Check("compiled blocks", steps.compiled, is_quick=False),
    Check("three cuts", steps.cuts),
    Check("infinite gradients", steps.infinities),
    Check("resume of a run", runs.resumed),
    Check("ledger and clock", runs.ledger),
    Check("a dead rank", ranks.dead_rank),
    Check("measured widths", steps.widths_repeat, is_quick=False),
)
