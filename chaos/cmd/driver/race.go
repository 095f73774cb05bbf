//go:build race

package main

// raceDetector is true if the driver was built with the race detector. The workers are then built
// with it, too.
const raceDetector = true
