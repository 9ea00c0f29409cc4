"""From what a user typed to a job that can run.

This package owns the forms that an input may have, its fingerprint, the inference of what the output looks like, the choice
of batch size, weights and chunks, the plan that people read, and :class:`~daskinfer.planning.job.InferenceJob`, the one
record that says what a call computes. Everything that cannot work is refused here, all problems at once, before a worker
starts and before a row is read; the output's shape comes from fake tensors or from a run on two rows of zeros. A refusal
shows what to type instead: code for an input that is no array (``input_advice``), and a change of dtype or axes that was
tried on the model (``trial_advice``).

Planning must not know distributed, a cluster or a client: devices arrive resolved, as plain records (a ``Placement``), since
resolving them may mean asking the workers of an external cluster. It decides nothing about rows itself but asks
``scheduling``, which sees only numbers, and it carries out nothing: that is what ``execution`` does with the job. The job
stays in the client; workers get ``InferenceJob.spec``, its part that is the same for every task.
"""
