"""What a training step costs: FLOPs by part, bytes held, time on a named device. Everything follows from the sizes.

:class:`.step.TrainingStep` says what is run, :mod:`.flops` and :mod:`.memory` what it takes, :mod:`.devices` how fast
that goes, and :mod:`.command` prints it (``quietstar estimate``).
"""
