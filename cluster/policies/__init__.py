"""The pure decisions: data in, plan out. No I/O; clock and random generator are arguments."""
