"""What travels to the engine of one item, each name after its modality."""

FEATURES = "_features"  # [p, D], the model's dtype, for the projector
ROWS = "_rows"  # [p, W], the model's dtype, past the projector
NEWLINES = "_newlines"  # [p] bool, which of these are newlines
KEPT = "_kept"  # [p] int64, on the CPU, which of the unpruned placeholders these are
