"""Where training windows come from: schedule, replay buffer and generation. Imports models and the rooms below it."""
