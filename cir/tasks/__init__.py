"""What a retrieval model is trained on: which triplets, texts and views a step draws; a file for each kind of model."""

from cir.tasks.blip import BlipTask
from cir.tasks.fusion import FusionTask
from cir.tasks.triplets import TripletTask

# VariantConfig.model -> what draws its batches, builds it, and says what it sees
TASKS: dict[str, type[TripletTask]] = {"fusion": FusionTask, "blip": BlipTask}
