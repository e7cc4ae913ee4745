"""Token data: `prepare` writes it, `tokens` reads it, `order` says which rows a step takes, `loader` joins them.

From a source to a shard: `sources` finds files, `kinds` says what they are, `formats` and `documents` read them,
`encode` tokenizes, `pack` cuts; `claim` says who does it, `notes` what came of it.
"""
