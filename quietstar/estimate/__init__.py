"""What a training step costs: FLOPs by part, bytes held, time on a named device. Everything follows from the sizes.

``.step.TrainingStep`` says what is run, ``.flops`` and ``.memory`` what it takes, ``.devices`` how fast
that goes, and ``.command`` prints it (``quietstar estimate``).
"""
