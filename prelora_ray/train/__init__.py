"""The main job: a Ray Train worker loop through all phases, and the driver that starts it."""
