// Command benchreader reads files in one of the ways that the benchmarks time, with as little of its
// own in between as it can, and prints one line of JSON: seconds, operations, bytes, cpu_seconds.
//
// What it needs to know beforehand (names, offsets) it has ready before the clock starts, and it
// touches nothing else of the tree.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"
)

const usage = `usage: benchreader WAY [--block BYTES] [--count N] [--seed N] [--readers N] [--list FILE] PATH
  seq FILE            reads it from its beginning to its end
  rand FILE           --count reads of --block bytes at random multiples of --block
  mmap FILE           touches each page, in order
  mmap-rand FILE      touches --count pages at random
  walk DIR            reads all directories and asks for all attributes, as find -ls
  stat DIR            asks for the attributes of the names in --list
  small DIR           opens, reads and closes the files in --list, --readers at once
  exec DIR            runs --program --count times with DIR as its root`

type job struct {
	path    string
	block   int
	count   int
	seed    int64
	readers int
	list    []string
	program string
	// clock starts the measurement; each way calls it once it is ready.
	clock func()
}

// done is how much a way did.
type done struct {
	operations, bytes int64
}

var ways = map[string]func(*job) (done, error){
	"seq": sequential, "rand": random, "mmap": mappedInOrder, "mmap-rand": mappedAtRandom,
	"walk": walk, "stat": stat, "small": small, "exec": execute,
}

func main() {
	if len(os.Args) < 2 || ways[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	// What it allocates is little, and no collection is to fall into the measurement.
	debug.SetGCPercent(-1)
	var j job
	var list string
	flags := flag.NewFlagSet("benchreader", flag.ExitOnError)
	flags.Usage = func() { fmt.Fprintln(os.Stderr, usage) }
	flags.IntVar(&j.block, "block", 1<<20, "")
	flags.IntVar(&j.count, "count", 1000, "")
	flags.Int64Var(&j.seed, "seed", 1, "")
	flags.IntVar(&j.readers, "readers", 1, "")
	flags.StringVar(&list, "list", "", "")
	flags.StringVar(&j.program, "program", "/usr/bin/true", "")
	_ = flags.Parse(os.Args[2:])
	if flags.NArg() != 1 || j.block <= 0 || j.count <= 0 || j.readers <= 0 {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	j.path = flags.Arg(0)
	if list != "" {
		text, err := os.ReadFile(list)
		if err != nil {
			fail(err)
		}
		for _, name := range strings.Split(strings.TrimSuffix(string(text), "\n"), "\n") {
			j.list = append(j.list, name)
		}
	}
	// Names are looked up from there: how deep a tree lies is not to be measured.
	if os.Args[1] == "walk" || list != "" {
		if err := os.Chdir(j.path); err != nil {
			fail(err)
		}
		j.path = "."
	}
	var begin time.Time
	var cpu float64
	j.clock = func() { cpu, begin = cpuSeconds(), time.Now() }
	did, err := ways[os.Args[1]](&j)
	if err != nil {
		fail(err)
	}
	_ = json.NewEncoder(os.Stdout).Encode(map[string]any{
		"seconds": time.Since(begin).Seconds(), "cpu_seconds": cpuSeconds() - cpu, "operations": did.operations, "bytes": did.bytes,
	})
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "benchreader:", err)
	os.Exit(1)
}
