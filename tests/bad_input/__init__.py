"""Everything that can be handed in wrong is refused with an error that says how to mend it.

Where nothing ran yet, the cache is left as it was: it then goes on exactly as an untouched twin
does. Where the error got inside a forward, the cache refuses to be used until `reset()`.
"""
