"""Data: rows (`sources`) -> examples (`formats`) -> tokens (`chat`) -> batches (`batching`)."""
