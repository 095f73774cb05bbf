//go:build race

package main

// raceDetector: the driver looks for data races, so the workers do, too.
const raceDetector = true
