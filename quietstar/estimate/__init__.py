"""What a training step costs: FLOPs by part, bytes held, time on a named device. Everything follows from the sizes.

``.step.TrainingStep`` says what is run; ``.skeleton`` has its model without data, ``.dry_run`` runs layers of it;
``.flops`` and ``.memory`` say what all takes, ``.devices`` how fast that goes, and ``.command`` prints it
(``quietstar estimate``).
"""
