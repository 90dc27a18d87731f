"""Data: rows (`rows`) -> examples (`formats`) -> tokens (`chat`), prepared (`sources`) -> batches (`batching`)."""
