"""Files of weights, in and out: every format is opened as a `Checkpoint` and streamed tensor by tensor."""
