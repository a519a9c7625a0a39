"""The BatchNorm layer itself: one that changes nothing, and what training changes in it."""
