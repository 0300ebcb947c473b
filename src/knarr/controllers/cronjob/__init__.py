"""CronJob: Jobs by the clock. `schedule` reads cron lines, `controller` starts and clears Jobs."""
