"""`appliance doctor`: one check per file, each a function ``check(context) -> list[Finding]``.

Rules:

- A check says what it found and what to do; it repairs nothing, writes nothing into the data, and takes away what it
  writes elsewhere.
- What names the hospital (hosts, paths, users, cases, certificate names) stands in a finding's `private` slots and
  nowhere else: what leaves the house is rendered without them (appliance.doctor.finding).
- Every check has a time limit; one that crashes or does not end is a numbered finding (appliance.doctor.run).
- torch and nnU-Net are asked in a child process of the worker (appliance.worker.trial), never here.
"""
